"""Our own names, those of `bam_kernels.BAM` and `bam_kernels.reference.BAM` of any preset."""

from bam_kernels.integrate.clients.client import Client

CLIENT = Client(
    name="bam_kernels",
    what="bam_kernels' BAM",
    channel="channel",
    spatial="spatial",
    fc=lambda i: f"channel.fc.{i}",
    fc_norm=lambda i: f"channel.hidden_norm.{i}",
    channel_norm="channel.norm",
    reduce="spatial.reduce",
    reduce_norm="spatial.hidden_norm.0",
    dilated=lambda i: f"spatial.dilated.{i}",
    dilated_norm=lambda i: f"spatial.hidden_norm.{i + 1}",
    project="spatial.project",
    spatial_norm="spatial.norm",
    optional_norms=True,
)
