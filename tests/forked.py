"""All that the processes of tests import, imported once by the process that they are forked from.

Kept out of garbage collections: none of it becomes garbage, and looking through it takes a quarter
of its import and, in each process, far longer than what a test leaves.
"""

import gc
import importlib

gc.disable()
for name in (
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "peft",
    "sarm.ppo.trainer",
    "serving.__main__",
    "serving.scorer",
    "tests.ranks",
):
    importlib.import_module(name)
gc.freeze()
gc.enable()
