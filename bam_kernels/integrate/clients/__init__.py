"""The BAMs that people have, one a file: their layers' names and their presets. No package of
theirs is needed, nor imported."""

from bam_kernels.integrate.clients import changzy00, fightingcv, official, own, pytorchcv
from bam_kernels.integrate.clients.client import Client

CLIENTS: dict[str, Client] = {
    module.CLIENT.name: module.CLIENT for module in (official, pytorchcv, fightingcv, changzy00)
}

OWN = own.CLIENT

__all__ = ["CLIENTS", "OWN", "Client"]
