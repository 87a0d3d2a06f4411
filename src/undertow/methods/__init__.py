"""Published methods, one file each. A method is a small frozen config: plan + edges + default schedule."""

from undertow.methods.base import METHODS, Method, Parts
from undertow.methods.coconut import Coconut
from undertow.methods.loops import BlockLoop, MiddleLoop
from undertow.methods.lrt import LRT
from undertow.methods.reuse_map import ReuseMap
from undertow.methods.t2mlr import T2MLR
from undertow.methods.trm_block import TRMBlock

__all__ = ["METHODS", "BlockLoop", "Coconut", "LRT", "Method", "MiddleLoop", "Parts", "ReuseMap", "T2MLR", "TRMBlock"]
