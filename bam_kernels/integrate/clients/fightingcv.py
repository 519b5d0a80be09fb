"""fightingcv-attention (PyPI, 1.0.0): ``fightingcv_attention.attention.BAM.BAMBlock``.

Its 3x3 convolutions are padded by 1 whatever their dilation ``dia_val``, so that the default of 2
takes maps of 7x7 alone, and ``dia_val=1`` every size.
"""

from bam_kernels.integrate.clients.client import Client

CLIENT = Client(
    name="fightingcv",
    what="fightingcv's BAMBlock",
    channel="ca",
    spatial="sa",
    fc=lambda i: f"ca.ca.fc{i}",
    fc_norm=lambda i: f"ca.ca.bn{i}",
    last_fc="ca.ca.last_fc",
    reduce="sa.sa.conv_reduce1",
    reduce_norm="sa.sa.bn_reduce1",
    dilated=lambda i: f"sa.sa.conv_{i}",
    dilated_norm=lambda i: f"sa.sa.bn_{i}",
    project="sa.sa.last_conv",
)
