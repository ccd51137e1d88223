"""Many ranks: the gang of workers, collectives, distributed top-k, jobs.

May import `kernels`, `offload` and `runtime`; nothing below knows that there are other ranks but by the `Comm` it is given. Under
construction.
"""
