"""One router, one prefill and one decode worker without I/O, joined by a scripted network.

The schedulers, both hand-off state machines, the block pools, the router's lifecycle and both
halves of the block protocol are the real ones. A seed decides the order of everything that could
happen in any order: messages are FIFO within a channel and nothing more, blocks move at any moment
and may be lost, doubled or damaged on the way, the engine writes at any moment of its step, faults
and cancels come at any time. After every event both pools are audited, and every write to decode's
memory is checked against the grants.
"""

from tests.handoff_simulation.faulty_transport import Fault
from tests.handoff_simulation.setup import DECODE, EPOCH, FINGERPRINT, Request, Setup, outcome
from tests.handoff_simulation.simulation import Simulation

__all__ = ["DECODE", "EPOCH", "FINGERPRINT", "Fault", "Request", "Setup", "Simulation", "outcome"]
