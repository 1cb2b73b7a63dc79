"""What the fields of a configuration may be."""

import pytest

from configs import base, folder
from jtsm_jax.train import fields
from jtsm_jax.types import InputError


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "backbone.name",
      "vgg16",
      "'vgg16'.*'resnet_ws', 'resnet', 'efficientnet_lite0'",
    ),
    ("backbone.outputs", ("res5", "res6"), "res6.*: res2, res3, res4, res5"),
    ("backbone.outputs", ("stem",), "stem.*: res2, res3, res4, res5"),
    ("backbone.outputs", (), "outputs"),
    ("backbone.freeze", "res9", "'res9'.*stem, res2, res3, res4, res5"),
    ("backbone.stride", 32, "stride is 32; resnet_ws has one of 8, 16"),
    ("evaluation.show_present", True, r"show_present.*calibrate=True"),
    ("backbone.pretrained", "coco", r"'coco'.*resnet_ws.*'imagenet'"),
    ("backbone.pretrained", "imagenet", r"'imagenet'.* weights for resnet_ws"),
    ("backbone.pretrained", "w.npz", r"w.npz.*\.pkl or \.pth or \.safetensors"),
    ("data.crop", 0.0, r"crop is 0.0; wanted a share .* \(0, 1\]"),
    ("data.crop", 1.5, "crop is 1.5"),
    ("evaluation.proposal_block", 12, "block is 12; wanted a multiple of 8"),
    ("train.proposal_block", -8, r"train\.proposal_block is -8; wanted a mult"),
    ("train.memory_gib", -1.0, "memory_gib is -1.0; wanted a device's memory"),
    ("data.colour_factor", 0.5, "colour_factor is 0.5; .* at least 1"),
    ("proposals.num_superpixels", 32768, "is 32768; wanted 1 to 32767"),
    ("proposals.max_proposals", 4001, "is 4001; wanted 1 to 4000"),
    ("proposals.max_side", 8, "config.proposals.max_side is 8; wanted 16 to"),
    ("pooling.size_exponents", (0.25,), r"is \(0\.25,\); wanted two numbers"),
    *[
      (field, 0, rf"{field} is 0; wanted at least 1")
      for field in (
        "train.log_every",
        "train.batch_size",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.loader_threads",
        "losses.mask_stride",
        "train.calibration_images",
        "evaluation.batch_size",
        "losses.instances_per_image",
        "reestimation.iterations",
        "reestimation.longest_side",
      )
    ],
    *[
      (field, -1, rf"{field} is -1; wanted at least 0")
      for field in (
        "proposals.num_workers",
        "reestimation.threads",
        "train.loader_workers",
      )
    ],
    ("pooling.sampling_ratio", -1, "is -1; wanted a number of points, or 0"),
    ("train.evaluate_every", -1, "is -1; wanted a number of steps, or 0 for n"),
    ("train.images_every", -1, "images_every is -1; wanted a number of steps"),
    *[
      (field, 34 if "depth" in field else "other", f"{field} is .*wanted one")
      for field in fields.CHOICES
    ],
  ],
)
def test_unknown_values_are_input_errors(field, value, message):
  config = base.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(InputError, match=message):
    fields.check_fields(config)


def test_a_preset_that_needs_the_network_is_told_by_its_fields():
  config = base.get_config()
  config.proposals.network = False
  fields.check_fields(config)  # "unfitted" needs none
  config.proposals.preset = "quality"
  wanted = r"config\.proposals\.preset 'quality' .*network=True.*preset='fast'"
  with pytest.raises(InputError, match=wanted):
    fields.check_fields(config)


@pytest.mark.parametrize(
  ("changes", "is_refused"),
  [
    ({"train.steps": 700}, True),
    ({"train.steps": 701}, False),
    ({"train.steps": 702, "reestimation.lag": 2}, True),
    ({"train.steps": 703, "reestimation.lag": 2}, False),
    ({"train.steps": 500, "task": "instance"}, True),
    ({"train.steps": 500, "instance.enabled": False}, True),
    ({"train.steps": 500, "task": "detection"}, False),
    (
      {"train.steps": 5, "instance.enabled": False, "semantic.enabled": False},
      False,
    ),
  ],
)
def test_branches_that_would_never_learn_are_refused(changes, is_refused):
  config = folder.get_config()
  assert config.reestimation.start == 700
  config.update_from_flattened_dict(changes)
  fields.check_fields(config)  # what was trained so can still be used
  if not is_refused:
    return fields.check_schedule(config)
  wanted = rf"start is 700.*train\.steps is {config.train.steps}.*instance\.en"
  with pytest.raises(InputError, match=wanted):
    fields.check_schedule(config)


@pytest.mark.parametrize("value", [7, (), ((64,),), ((64, 60),), ((0, 64),)])
def test_canvases_that_are_none_are_named(value):
  config = base.get_config()
  with config.unlocked():
    config.data = {"canvases": value}
  with pytest.raises(
    InputError, match=r"config\.data\.canvases.*multiples of 8"
  ):
    fields.canvases(config, "data")


def test_canvases_are_plain_pairs():
  config = base.get_config()
  with config.unlocked():
    config.data = {"canvases": [[64, 96], (96, 64)]}
  assert fields.canvases(config, "data") == ((64, 96), (96, 64))
