"""The first minutes with a GPU: build, check, time, and bring back what there is when the time is over.

`tools/first_contact.sh` starts it. Only the processes that it starts need PyTorch; what runs them is the standard
library's, so that it outlives whatever happens to them. docs/first_contact.md tells what comes back.
"""
