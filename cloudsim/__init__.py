"""cloudsim: a CloudHub double on the real wire, for tests, demos and module authors (docs/cloudsim.md)."""

from cloudsim.config import SimConfig
from cloudsim.faults import Fault
from cloudsim.recorder import Received
from cloudsim.rules import HubVersion
from cloudsim.sim import CloudSim
from cloudsim.wire import CloudMessage, Header, Route

__all__ = ["CloudMessage", "CloudSim", "Fault", "Header", "HubVersion", "Received", "Route", "SimConfig"]
