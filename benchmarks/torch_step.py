"""The training step of benchmarks/training_step.py in plain PyTorch.

As the authors' stack runs it: torchvision's roi_pool over all proposals, two
fully connected layers, a two-stream head, four refinement heads whose labels
come from the best boxes of the head before, a mask branch on some boxes of
an image, a semantic branch, SGD with momentum; autocast for bfloat16. The masks
are given, as in the step beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional

HEADS = 4
BLOCKS = {18: (2, 2, 2, 2)}


def torch_step(args, canvas, batch) -> Callable[[], None]:
  """A function that does one step and waits for it.

  Args:
    args: of the benchmark.
    canvas: (H, W).
    batch: of `synthetic_batch`.
  """
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.allow_tf32 = True
  torch.backends.cudnn.benchmark = True
  model = Model(args).to(device)
  if device == "cuda":
    model = model.to(memory_format=torch.channels_last)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=5e-4)
  images = torch.from_numpy(batch.images).permute(0, 3, 1, 2).to(device)
  boxes = torch.from_numpy(batch.boxes[..., [1, 0, 3, 2]].copy()).to(device)
  tags = torch.from_numpy(batch.tags).to(device)
  rng = np.random.default_rng(1)
  rows, columns = (side // 4 for side in canvas)
  masks = torch.from_numpy(rng.random((args.batch, rows, columns)) < 0.5)
  labels = torch.from_numpy(
    rng.integers(0, 1 + args.stuff, (args.batch, rows, columns))
  )
  masks, labels = masks.to(device).float(), labels.to(device)
  use_bf16 = args.precision == "bfloat16"

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=use_bf16):
      loss = model(images, boxes, tags, masks, labels)
    loss.backward()
    optimizer.step()
    if device == "cuda":
      torch.cuda.synchronize()

  return step


class Model(nn.Module):
  """A frozen ResNet-WS of basic blocks and everything above it."""

  def __init__(self, args):
    super().__init__()
    if args.depth not in BLOCKS:
      raise SystemExit("--torch knows --depth 18")
    self.things, classes = args.things, args.things + args.stuff
    self.backbone = backbone(BLOCKS[args.depth]).eval()
    for parameter in self.backbone.parameters():
      parameter.requires_grad = False
    width = args.width
    self.neck = nn.Sequential(
      nn.Linear(512 * 49, width),
      nn.ReLU(inplace=True),
      nn.Dropout(0.5),
      nn.Linear(width, width),
      nn.ReLU(inplace=True),
      nn.Dropout(0.5),
    )
    self.classify, self.detect = (
      nn.Linear(width, classes),
      nn.Linear(width, classes),
    )
    self.refine = nn.ModuleList(
      nn.Linear(width, classes + 1) for _ in range(HEADS)
    )
    channels, self.instances = args.channels, args.instances
    convs = []
    for i in range(4):
      convs += [
        nn.Conv2d(512 if i == 0 else channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
      ]
    self.mask = nn.Sequential(
      *convs,
      nn.ConvTranspose2d(channels, channels, 2, stride=2),
      nn.ReLU(inplace=True),
      nn.Conv2d(channels, args.things, 1),
    )
    self.semantic = nn.Sequential(
      nn.Conv2d(512, channels, 3, padding=1),
      nn.ReLU(inplace=True),
      nn.Conv2d(channels, channels, 3, padding=1),
      nn.ReLU(inplace=True),
      nn.Conv2d(channels, 1 + args.stuff, 1),
    )

  def forward(self, images, boxes, tags, masks, semantic_labels):
    """The loss of a batch."""
    with torch.no_grad():
      mean = images.new_tensor([122.8, 115.9, 103.0], dtype=torch.float32)
      features = self.backbone(images.float() - mean[:, None, None])
    B, P = boxes.shape[:2]
    pooled = torchvision.ops.roi_pool(features, list(boxes), 7, 1 / 8)
    hidden = self.neck(pooled.flatten(1)).view(B, P, -1)
    over_classes = self.classify(hidden).float().softmax(2)
    over_boxes = self.detect(hidden).float().softmax(1)
    scores = over_classes * over_boxes
    y = scores.sum(1).clamp(1e-6, 1 - 1e-6)
    # Autocast refuses binary_cross_entropy; this is its formula.
    loss = -(tags * y.log() + (1 - tags) * (1 - y).log()).sum(1).mean()
    for head in self.refine:
      logits = head(hidden).float()
      labels, weights = pseudo_labels(scores.detach(), y.detach(), boxes, tags)
      terms = functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none"
      )
      loss = loss + (terms * weights).mean()
      scores = logits.softmax(2)
    labels, _ = pseudo_labels(scores.detach(), y.detach(), boxes, tags)
    return (
      loss
      + self.instance_loss(features, boxes, labels, masks)
      + functional.cross_entropy(
        functional.interpolate(
          self.semantic(features).float(),
          size=semantic_labels.shape[1:],
          mode="bilinear",
        ),
        semantic_labels,
      )
    )

  def instance_loss(self, features, boxes, labels, masks):
    """Binary cross-entropy of the masks of labelled things."""
    chosen = (labels < self.things).float().topk(self.instances, dim=1).indices
    boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    category = labels.gather(1, chosen).clamp(max=self.things - 1).flatten()
    crops = torchvision.ops.roi_align(features, list(boxes), 14, 1 / 8)
    targets = torchvision.ops.roi_align(masks[:, None], list(boxes), 28, 1 / 4)
    logits = self.mask(crops).float()
    logits = logits[torch.arange(len(category)), category]
    return functional.binary_cross_entropy_with_logits(
      logits, targets[:, 0].round()
    )


def pseudo_labels(scores, y, boxes, tags):
  """Class and weight of each box, from the best box of each tag."""
  B, P = boxes.shape[:2]
  classes = tags.shape[1]
  labels = torch.full((B, P), classes, device=boxes.device)
  weights = torch.ones((B, P), device=boxes.device)
  for b in range(B):
    (present,) = torch.nonzero(tags[b], as_tuple=True)
    best = scores[b][:, present].argmax(0)
    iou = torchvision.ops.box_iou(boxes[b], boxes[b][best])
    overlap, nearest = iou.max(1)
    labels[b] = torch.where(overlap >= 0.5, present[nearest], labels[b])
    weights[b] = y[b][present[nearest]]
  return labels, weights


def backbone(blocks) -> nn.Sequential:
  """ResNet-WS of basic blocks at stride 8; norms are folded into the bias."""
  layers = []
  for i, stride in enumerate((2, 1, 1)):
    layers += [
      nn.Conv2d(3 if i == 0 else 64, 64, 3, stride=stride, padding=1),
      nn.ReLU(inplace=True),
    ]
  layers.append(nn.MaxPool2d(2))
  channels = 64
  for stage, (count, outputs) in enumerate(
    zip(blocks, (64, 128, 256, 512), strict=True), start=2
  ):
    dilation = 2 if stage >= 4 else 1
    if stage == 3:
      layers.append(nn.MaxPool2d(2))
    for _ in range(count):
      layers.append(Block(channels, outputs, dilation))
      channels = outputs
  return nn.Sequential(*layers)


class Block(nn.Module):
  """Two convolutions and a short cut."""

  def __init__(self, inputs, outputs, dilation):
    super().__init__()
    options = dict(padding=dilation, dilation=dilation)
    self.conv1 = nn.Conv2d(inputs, outputs, 3, **options)
    self.conv2 = nn.Conv2d(outputs, outputs, 3, **options)
    self.shortcut = (
      nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
    )

  def forward(self, x):
    y = self.conv2(functional.relu(self.conv1(x), inplace=True))
    return functional.relu(self.shortcut(x) + y, inplace=True)
