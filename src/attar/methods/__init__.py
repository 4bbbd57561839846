"""The methods: one file per published method, one import line here."""

from attar.method import Method
from attar.methods.at import AT
from attar.methods.bake import BAKE
from attar.methods.blockwise import Blockwise
from attar.methods.byot import BYOT
from attar.methods.codistillation import Codistillation
from attar.methods.cs_kd import CSKD
from attar.methods.ddgsd import DDGSD
from attar.methods.dlb import DLB
from attar.methods.dml import DML
from attar.methods.fitnet import FitNet
from attar.methods.frskd import FRSKD
from attar.methods.indistill import InDistill
from attar.methods.information_flow import InformationFlow
from attar.methods.kd import KD
from attar.methods.kdcl import KDCL
from attar.methods.meal import MEAL
from attar.methods.moonshine import Moonshine
from attar.methods.okddip import OKDDip
from attar.methods.one import ONE
from attar.methods.online_ensemble import OnlineEnsemble
from attar.methods.osakd import OSAKD
from attar.methods.oskd import OSKD
from attar.methods.pcl import PCL
from attar.methods.pkt import PKT
from attar.methods.ps_kd import PSKD
from attar.methods.sad import SAD
from attar.methods.scd import SCD
from attar.methods.sla import SLA
from attar.methods.spkd import SPKD
from attar.methods.srm import SRM
from attar.methods.supervised import Supervised
from attar.methods.tf_kd import TfKD

__all__ = [
    "AT",
    "BAKE",
    "BYOT",
    "CSKD",
    "DDGSD",
    "DLB",
    "DML",
    "FRSKD",
    "KD",
    "KDCL",
    "MEAL",
    "ONE",
    "OSAKD",
    "OSKD",
    "PCL",
    "PKT",
    "PSKD",
    "SAD",
    "SCD",
    "SLA",
    "SPKD",
    "SRM",
    "Blockwise",
    "Codistillation",
    "FitNet",
    "InDistill",
    "InformationFlow",
    "Moonshine",
    "OKDDip",
    "OnlineEnsemble",
    "Supervised",
    "TfKD",
    "available",
    "find",
]


def available() -> dict[str, type[Method]]:
    """Every method by name, in alphabetical order."""
    found = {name: value for name, value in globals().items() if isinstance(value, type) and issubclass(value, Method)}
    found.pop("Method")
    return dict(sorted(found.items()))


def find(name: str) -> type[Method]:
    """Return the method of that name, whatever its case.

    Raises:
        AttarError: there is none; the message names the nearest.
    """
    from attar.errors import unknown_name

    folded = {known.casefold(): method for known, method in available().items()}
    if name.casefold() not in folded:
        raise unknown_name("method", name, available())
    return folded[name.casefold()]
