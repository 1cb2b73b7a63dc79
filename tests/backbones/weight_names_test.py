"""Names of variables in the files, as their authors' code has them."""

import pytest

from jtsm_jax.backbones import weight_names


@pytest.mark.parametrize(
  ("ours", "caffe2", "torch"),
  [
    ("params/stem1/conv/kernel", "stem_conv1_w", "stem.conv1.weight"),
    ("params/stem3/norm/scale", "stem_conv3_bn_s", "stem.conv3.norm.weight"),
    (
      "params/res3_0/shortcut/conv/kernel",
      "res3_0_branch1_w",
      "res3.0.shortcut.weight",
    ),
    (
      "params/res4_22/conv1/norm/bias",
      "res4_22_branch2a_bn_b",
      "res4.22.conv1.norm.bias",
    ),
    (
      "batch_stats/res2_1/conv2/norm/mean",
      "res2_1_branch2b_bn_rm",
      "res2.1.conv2.norm.running_mean",
    ),
    (
      "batch_stats/res5_2/conv3/norm/var",
      "res5_2_branch2c_bn_riv",
      "res5.2.conv3.norm.running_var",
    ),
    ("neck/fc1/kernel", "fc1_w", "neck.fc1.weight"),
    ("neck/fc2/bias", "fc2_b", "neck.fc2.bias"),
  ],
)
def test_resnet_ws(ours, caffe2, torch):
  assert weight_names.CAFFE2.name(ours) == caffe2
  assert weight_names.TORCH_WS.name(ours) == torch


@pytest.mark.parametrize(
  ("theirs", "plain"),
  [
    ("conv1_1_w", "stem_conv1_w"),
    ("conv1_3_bn_s", "stem_conv3_bn_s"),
    ("stem_conv2_bn_b", "stem_conv2_bn_b"),
    ("fc6_w", "fc1_w"),
    ("fc7_b", "fc2_b"),
    ("fc8_w", "fc3_w"),
    ("fc2_b", "fc2_b"),
    ("res4_10_branch2a_bn_running_mean", "res4_10_branch2a_bn_rm"),
    ("res4_1_branch2a_bn_running_var", "res4_1_branch2a_bn_riv"),
    ("res2_0_branch1_bn_gamma", "res2_0_branch1_bn_s"),
    ("res2_0_branch1_bn_beta", "res2_0_branch1_bn_b"),
    ("res_conv1_bn_s", "res_conv1_bn_s"),
    ("conv1_w", "conv1_w"),
  ],
)
def test_caffe2_names_after_the_authors_tool(theirs, plain):
  assert weight_names.CAFFE2.plain(theirs) == plain


@pytest.mark.parametrize(
  ("theirs", "plain"),
  [
    ("module.backbone.res2.0.conv1.weight", "res2.0.conv1.weight"),
    ("backbone.stem.conv1.norm.bias", "stem.conv1.norm.bias"),
    ("module.neck.fc1.weight", "neck.fc1.weight"),
    ("roi_heads.box_head.fc2.bias", "neck.fc2.bias"),
    ("module.linear.weight", "linear.weight"),
  ],
)
def test_pytorch_names_before_and_after_the_authors_tool(theirs, plain):
  assert weight_names.TORCH_WS.plain(theirs) == plain


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    ("params/stem/conv/kernel", "conv1.weight"),
    ("params/stem/norm/scale", "bn1.weight"),
    ("batch_stats/stem/norm/var", "bn1.running_var"),
    ("params/res2_0/conv1/conv/kernel", "layer1.0.conv1.weight"),
    ("params/res5_2/conv3/norm/bias", "layer4.2.bn3.bias"),
    ("params/res3_0/shortcut/conv/kernel", "layer2.0.downsample.0.weight"),
    (
      "batch_stats/res3_0/shortcut/norm/mean",
      "layer2.0.downsample.1.running_mean",
    ),
  ],
)
def test_torchvision(ours, theirs):
  assert weight_names.TORCHVISION.name(ours) == theirs


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    ("params/stem/kernel", "_conv_stem.weight"),
    ("params/stem_norm/scale", "_bn0.weight"),
    ("params/block0/depthwise/kernel", "_blocks.0._depthwise_conv.weight"),
    ("batch_stats/block15/expand_norm/mean", "_blocks.15._bn0.running_mean"),
    ("params/block3/depthwise_norm/bias", "_blocks.3._bn1.bias"),
    ("batch_stats/block3/project_norm/var", "_blocks.3._bn2.running_var"),
    ("params/head/kernel", "_conv_head.weight"),
    ("params/head_norm/scale", "_bn1.weight"),
    ("params/classifier/bias", "_fc.bias"),
  ],
)
def test_efficientnet_lite0(ours, theirs):
  assert weight_names.efficientnet_lite0_name(ours) == theirs
