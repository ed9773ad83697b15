"""`train_ds.py`, with SIGTERM sent to one rank and its data workers while it is in a given step, as a queue does.

usage: train_and_stop.py STEP RANK FLAG…
"""

import multiprocessing
import os
import signal
import sys

import train_ds
from higgs_ds import trainer

if __name__ == "__main__":
    step, rank, *flags = sys.argv[1:]
    original = trainer.Trainer.train_step

    def train_step(self, number, batches, lr):
        if number == int(step) and self.ranks.rank == int(rank):
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGTERM)
        return original(self, number, batches, lr)

    trainer.Trainer.train_step = train_step
    sys.exit(train_ds.main(flags))
