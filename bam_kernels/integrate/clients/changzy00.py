"""changzy00/pytorch-attention: its ``BAM``, which comes as source only, and is in forks of YOLO."""

from bam_kernels.integrate.clients.client import Client

CLIENT = Client(
    name="changzy00",
    what="changzy00's BAM",
    channel="channel_attn",
    spatial="spatial_attn",
    fc="channel_attn.mlp.0",
    last_fc="channel_attn.mlp.2",
    channel_norm="channel_attn.bn",
    reduce="spatial_attn.conv1",
    dilated=lambda i: f"spatial_attn.conv2.{3 * i}",
    dilated_norm=lambda i: f"spatial_attn.conv2.{3 * i + 1}",
    project="spatial_attn.conv3",
    spatial_norm="spatial_attn.bn",
)
