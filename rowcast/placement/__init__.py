"""What goes where: hardware, costs, the planner and the plan file.

Plain numbers, no torch. Imports nothing of Rowcast but `runtime/spec.py`; every other package may read a `Plan`.
"""
