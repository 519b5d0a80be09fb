"""pytorchcv (PyPI, 0.0.74): ``pytorchcv.models.bamresnet.BamBlock``, in ``bam_resnet50`` and its
like, the only BAMs with published trained weights."""

from bam_kernels.integrate.clients.client import Client

CLIENT = Client(
    name="pytorchcv",
    what="pytorchcv's BamBlock",
    channel="ch_att",
    spatial="sp_att",
    fc="ch_att.init_fc.fc",
    fc_norm="ch_att.init_fc.bn",
    last_fc="ch_att.final_fc",
    reduce="sp_att.init_conv.conv",
    reduce_norm="sp_att.init_conv.bn",
    dilated=lambda i: f"sp_att.dil_convs.conv{i + 1}.conv",
    dilated_norm=lambda i: f"sp_att.dil_convs.conv{i + 1}.bn",
    project="sp_att.final_conv",
)
