"""The first minutes with a GPU: build, check, time, and keep all results when the time is over.

`tools/first_contact.sh` starts it. Only its child processes need PyTorch. The parent uses only the standard library, so
that it survives their crashes. docs/first_contact.md describes the output.
"""
