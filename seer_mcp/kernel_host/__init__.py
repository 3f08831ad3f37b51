"""The kernel host: the small program beside the kernel that never stops listening.

It starts the kernel, queues runs, numbers everything the kernel publishes, keeps it in a journal
on disk, and serves it to any number of readers from any number. It owns the sandbox's lifetime.

It travels alone: standard library + jupyter_client + ipykernel, Python 3.9 or later, and it
imports nothing of seer_mcp. Started as `python -m kernel_host CONFIG.json`.
"""
