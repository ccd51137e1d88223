"""Many ranks: the gang of workers, its launchers, its collectives; several gangs that share requests; jobs; where metrics go.

May import `kernels`, `offload` and `runtime`; nothing below knows that there are other ranks but by the `Comm` it is given.
"""
