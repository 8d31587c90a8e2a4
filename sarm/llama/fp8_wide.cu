// y = x W^T of a few rows, W in e4m3. fp8_wide.py says how it works, and defines before it compiles:
//   CHANNEL_TILES, ROW_TILES  tiles of 16 output channels and of 8 rows that a warp sums
//   CHANNEL_WARPS, INPUT_WARPS  a program's warps: so many by channels, so many by inputs, 64 each
//   STAGES  steps whose bytes are in shared memory or on their way
//   PARTS  programs, a cluster, that share a tile's sums over k
using u32 = unsigned;
using bf16 = unsigned short;

constexpr int CHANNELS = 16 * CHANNEL_TILES * CHANNEL_WARPS, ROWS = 8 * ROW_TILES;
constexpr int INPUTS = 64 * INPUT_WARPS, THREADS = 32 * CHANNEL_WARPS * INPUT_WARPS;
constexpr int WEIGHT_BYTES = CHANNELS * INPUTS, STAGE_BYTES = WEIGHT_BYTES + 2 * ROWS * INPUTS;
constexpr int PITCH = CHANNELS + 4;  // of a row of sums, so that no two lanes meet in a bank

// 16 bytes to shared memory, zeros where there is no source; `from` is an address of something.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
__device__ __forceinline__ void load16(u32* to, u32 from) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}
// Four e4m3 numbers as bf16, exactly: there is no instruction that does it straight.
__device__ __forceinline__ void widen(u32 four, u32& low, u32& high) {
  asm("{.reg .b16 p, q; .reg .b32 h; .reg .b16 a, b; .reg .f32 x, y; mov.b32 {p, q}, %2;"
      " cvt.rn.f16x2.e4m3x2 h, p; mov.b32 {a, b}, h;"
      " cvt.f32.f16 x, a; cvt.f32.f16 y, b; cvt.rn.bf16x2.f32 %0, y, x;"
      " cvt.rn.f16x2.e4m3x2 h, q; mov.b32 {a, b}, h;"
      " cvt.f32.f16 x, a; cvt.f32.f16 y, b; cvt.rn.bf16x2.f32 %1, y, x;}"
      : "=r"(low), "=r"(high) : "r"(four));
}
__device__ __forceinline__ bf16 rounded(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// sum += a b, of 16 channels, 16 inputs and 8 rows.
__device__ __forceinline__ void multiply(float* sum, const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
               ::: "memory");
}
// A float of another program's shared memory.
__device__ __forceinline__ float of_part(u32 at, u32 part) {
  float x;
  asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a];}"
               : "=f"(x) : "r"(at), "r"(part) : "memory");
  return x;
}

// x (rows, k) bf16, its rows `stride` apart; w (n, k); scale (n); out (rows, n). A program for each
// (part of k, tile of channels).
extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS)
wide(const bf16* __restrict__ x, const unsigned char* __restrict__ w,
     const float* __restrict__ scale, bf16* __restrict__ out, int rows, int n, int k, int stride) {
  extern __shared__ __align__(128) char room[];
  const u32 base = (u32)__cvta_generic_to_shared(room);
  const int thread = threadIdx.x, warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
  const int input_warp = warp % INPUT_WARPS, first_tile = warp / INPUT_WARPS * CHANNEL_TILES;
  const int part = blockIdx.x, first_channel = blockIdx.y * CHANNELS;
  const int steps = k / PARTS / INPUTS, first_input = part * (k / PARTS);
  x += first_input;
  w += (size_t)first_channel * k + first_input;

  // Chunks of 16 bytes; those of odd rows change places, so that eight lanes read all banks.
  auto weight_at = [&](int stage, int channel, int chunk) {
    return base + stage * STAGE_BYTES + channel * INPUTS + ((chunk ^ (channel & 1) * 4) * 16);
  };
  auto row_at = [&](int stage, int row, int chunk) {
    return base + stage * STAGE_BYTES + WEIGHT_BYTES + row * INPUTS * 2 + ((chunk ^ (row & 1)) * 16);
  };
  auto fetch = [&](int step, int stage) {
    if (step < steps) {
      constexpr int of_channel = INPUTS / 16, of_row = INPUTS / 8;
#pragma unroll
      for (int turn = 0; turn < 2 * CHANNEL_TILES; turn++) {
        const int i = turn * THREADS + thread, channel = i / of_channel, chunk = i % of_channel;
        copy16(weight_at(stage, channel, chunk),
               w + (size_t)channel * k + step * INPUTS + chunk * 16, true);
      }
#pragma unroll
      for (int turn = 0; turn < (ROWS * of_row + THREADS - 1) / THREADS; turn++) {
        const int i = turn * THREADS + thread, row = i / of_row, chunk = i % of_row;
        const bool there = row < rows;
        if (row < ROWS)
          copy16(row_at(stage, row, chunk),
                 x + (there ? row : 0) * stride + step * INPUTS + chunk * 8, there);
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  float sums[CHANNEL_TILES][ROW_TILES][4] = {};
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch(i, i);
  for (int step = 0, stage = 0; step < steps; step++, stage = stage == STAGES - 1 ? 0 : stage + 1) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();  // so every warp is done with the stage before this one, too
    fetch(step + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
    // Which input stands where within 64 is free, as long as both sides agree: a lane takes 16 that
    // lie side by side, four for each of four products.
    u32 inputs[ROW_TILES][8];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        load16(&inputs[r][half * 4],
               row_at(stage, r * 8 + group, input_warp * 8 + in_group * 2 + half));
#pragma unroll
    for (int c = 0; c < CHANNEL_TILES; c++) {
      const int channel = (first_tile + c) * 16 + group;
      u32 upper[4], lower[4];
      load16(upper, weight_at(stage, channel, input_warp * 4 + in_group));
      load16(lower, weight_at(stage, channel + 8, input_warp * 4 + in_group));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 weights[4];
        widen(upper[i], weights[0], weights[2]);
        widen(lower[i], weights[1], weights[3]);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) multiply(sums[c][r], weights, &inputs[r][2 * i]);
      }
    }
  }
  asm volatile("cp.async.wait_group 0;");
  __syncthreads();

  // The sums of the warps that share channels, then of the programs that do, each in their order.
  float* of_warps = (float*)room;  // (INPUT_WARPS, ROWS, PITCH)
#pragma unroll
  for (int c = 0; c < CHANNEL_TILES; c++)
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        of_warps[(input_warp * ROWS + r * 8 + in_group * 2 + i % 2) * PITCH +
                 (first_tile + c) * 16 + group + i / 2 * 8] = sums[c][r][i];
  __syncthreads();
  auto of_program = [&](int row, int channel) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < INPUT_WARPS; i++) sum += of_warps[(i * ROWS + row) * PITCH + channel];
    return sum;
  };
  auto write = [&](int row, int channel, float sum) {
    if (row < rows)
      out[(size_t)row * n + first_channel + channel] = rounded(sum * scale[first_channel + channel]);
  };
  if constexpr (PARTS == 1) {
    for (int i = thread; i < ROWS * CHANNELS; i += THREADS)
      write(i / CHANNELS, i % CHANNELS, of_program(i / CHANNELS, i % CHANNELS));
  } else {
    for (int i = thread; i < ROWS * CHANNELS; i += THREADS) {
      const int row = i / CHANNELS, channel = i % CHANNELS;
      of_warps[row * PITCH + channel] = of_program(row, channel);
    }
    meet_cluster();
    constexpr int SHARE = ROWS / PARTS;  // each program ends so many rows
    for (int i = thread; i < SHARE * CHANNELS; i += THREADS) {
      const int row = part * SHARE + i / CHANNELS, channel = i % CHANNELS;
      float sum = 0;
#pragma unroll
      for (int other = 0; other < PARTS; other++)
        sum += of_part(base + 4 * (row * PITCH + channel), other);
      write(row, channel, sum);
    }
    meet_cluster();  // nobody leaves while another reads
  }
}
