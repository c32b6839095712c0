"""The MPI transport, built against one MPI library. Import it through ``mpi_library.load()``."""

from mpi4py import MPI

from pycomm._core import Channel

class MpiChannel(Channel): ...

def make_channel(comm: MPI.Intracomm) -> MpiChannel:
    """A channel on a duplicate of ``comm``. Collective.

    Raises:
        CommError: mpi4py uses another MPI library, or MPI cannot be used from pycomm's thread.
            Nothing was sent.
    """
