"""The authors' released code: ``BAM`` of Jongchan/attention-module, MODELS/bam.py, and its copies.

It comes as source only. Both branches end in an ``expand_as``; the channel branch keeps a global
``gate_activation`` that its forward does not use, and pools over windows of H x H.
"""

from bam_kernels.integrate.clients.client import Client

CLIENT = Client(
    name="official",
    what="the authors' BAM",
    channel="channel_att",
    spatial="spatial_att",
    fc=lambda i: f"channel_att.gate_c.gate_c_fc_{i}",
    fc_norm=lambda i: f"channel_att.gate_c.gate_c_bn_{i + 1}",
    last_fc="channel_att.gate_c.gate_c_fc_final",
    reduce="spatial_att.gate_s.gate_s_conv_reduce0",
    reduce_norm="spatial_att.gate_s.gate_s_bn_reduce0",
    dilated=lambda i: f"spatial_att.gate_s.gate_s_conv_di_{i}",
    dilated_norm=lambda i: f"spatial_att.gate_s.gate_s_bn_di_{i}",
    project="spatial_att.gate_s.gate_s_conv_final",
)
