"""The fault matrix: every part of a running system is killed, frozen or cut off under load, and every token is counted.

    python -m bench.faults --cells R-01,M-02 --seeds 3

`load` puts streams on a cluster of processes, `scene` says what a cell is, `cells` which there are, `run` runs one. `fencing`
reads what leaders wrote out of etcd's own history, `judge` holds it all against what is promised, `report` prints it.
"""
