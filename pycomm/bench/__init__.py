"""Measures collectives side by side: pycomm, the MPIs and gloo, and what the machine can do.

``ranks/`` holds what runs in the ranks, of pycomm and of its peers; the rest starts them, gives
them turns and reports.
"""
