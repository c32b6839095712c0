"""Training that goes on without a lost rank, in seconds, and takes ranks in that come back.

::

    state = pycomm.elastic.State(model=model, optimizer=optimizer, sampler=sampler)

    def train(state):                                 # once for each world the ranks make up
        optimizer = pycomm.DistributedOptimizer(state.optimizer, state.model.named_parameters())
        loader = DataLoader(data, batch_sampler=state.sampler)
        while state.sampler.epoch < epochs:
            for images, labels in loader:             # what is left of the epoch
                optimizer.zero_grad()
                loss = state.sampler.weight * criterion(state.model(images), labels)
                loss.backward()
                optimizer.step()
                state.sampler.advance()
                state.commit()                        # a loss takes everybody back to here

    pycomm.elastic.run(train, state)

docs/elastic.md tells what happens when, and the exit codes.
"""

from pycomm.elastic.leaving import START_AGAIN
from pycomm.elastic.rescaling import Rule
from pycomm.elastic.running import run
from pycomm.elastic.sampler import Sampler
from pycomm.elastic.state import State

__all__ = ["START_AGAIN", "Rule", "Sampler", "State", "run"]
