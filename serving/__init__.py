"""The compound reward over HTTP: `python -m serving --run R`, for OpenRLHF, verl and TRL.

`app` speaks HTTP, `pool` keeps the queue and the scoring process, `worker` is that process,
`scorer` makes conversations of requests and scores of conversations, `transcripts` reads rendered
prompts, `client` is what trainers load. Only `worker` and what it imports load torch.
"""
