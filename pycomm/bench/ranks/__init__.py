"""What runs in the ranks that are measured.

A peer's environment has neither torch nor pycomm, so nothing here imports what a contender does not
need itself, and imports are relative: with ``pycomm/bench`` on its path such an environment runs
``python -m ranks.mpi``.
"""
