"""What `rowcast bench` measures: one module a subject, each prints a table and returns what goes into the JSON line.

Imports anything but `cli`. Benchmarks are not tests: they print ratios against a floor or against a peer in the same run.
"""
