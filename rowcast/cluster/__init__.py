"""Many ranks: the gang of workers, its launchers, its collectives. Distributed top-k, jobs and several nodes are under construction.

May import `kernels`, `offload` and `runtime`; nothing below knows that there are other ranks but by the `Comm` it is given.
"""
