"""A run before it runs: engines, scorers, trainer and failures as a discrete-event simulation. No torch, no I/O.

    lengths --> engines --> scoring workers --> trainer: log-probs, update, refresh, publish, checkpoint
                   ^                                |
                   +--------- weights --------------+        a node fails: back to the last checkpoint

SimPy and the modules here are imported only where a simulation is asked for.
"""
