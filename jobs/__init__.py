"""One thin module a phase, each with `run(config, run, unit, attempt)`; start with `python -m jobs
PHASE`.
"""
