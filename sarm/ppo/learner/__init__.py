"""The machinery under PPO: ranks, engines, CUDA graphs, offload, checkpoints, memory plan."""
