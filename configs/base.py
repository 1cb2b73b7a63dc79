"""Every field of an experiment, with the paper's settings as defaults.

Where a default is another, its comment says so.

The other files of this folder start from here and change what they need. A
field can be changed on the command line: `--config.train.steps=1000`.

Sections and equations are those of the paper. Where it is silent, the default
is explained in docs/decisions.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The paper's VOC 2012 setting, without a data set."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  # "panoptic"; "instance": things alone, without the semantic branch;
  # "detection": things alone, mining without branches.
  c.task = "panoptic"

  # Data. Sizes are (height, width) in pixels, multiples of the stride.
  c.data = ml_collections.ConfigDict()
  # "folder", "shapes", "voc_panoptic", "voc_detection", "coco_panoptic" or
  # "coco_instances", see docs/data.md.
  c.data.name = "folder"
  c.data.root = ""  # the folder of the data set's own files, or its URL
  c.data.year = "2012"  # of VOC: "2007" or "2012"
  c.data.train_set = ""  # of VOC and COCO; "" for the usual one
  c.data.val_set = ""
  c.data.sbd = ""  # of "voc_panoptic": the folder of SBD, or none
  # Where VOC's masks come from first: "voc", or "sbd" as the authors.
  c.data.annotation_source = "voc"
  c.data.prepared = ""  # prepared records, or a URL; default WORKDIR/data
  c.data.max_bad_fraction = 0.01  # unreadable images before the run aborts
  c.data.shapes = ml_collections.ConfigDict()  # of "shapes": the generator
  c.data.shapes.seed = 0
  c.data.shapes.num_train = 500
  c.data.shapes.num_val = 120
  c.data.shapes.side = 160
  # Each step draws one canvas; images are scaled into it. Section 4.1: short
  # sides 480 to 1216 by 32; here twelve of them, at 3 : 4 both ways, the long
  # side a multiple of 32, too.
  c.data.canvases = tuple(
    canvas
    for short in (*range(480, 1184, 64), 1216)
    for long in (-(-short * 4 // 96) * 32,)
    for canvas in ((short, long), (long, short))
  )
  c.data.flip = True  # the authors' code does; section 4.1: at test time
  # Parts of the images are shown, whose height and width are each at least this
  # share of the image's; 0.9 in the authors' code. Tags stay the image's own.
  c.data.crop = 1.0
  # Exposure and saturation change by up to this factor (section 4.1); 1 = not.
  # Anything but 1, here and above, turns the cache of features off.
  c.data.colour_factor = 1.5

  # Segment proposals.
  c.proposals = ml_collections.ConfigDict()
  c.proposals.store = ""  # or a URL; default WORKDIR/proposals
  # Proposals from elsewhere instead: a folder of MCG or COB .mat files, or a
  # JSON file of masks in COCO's result format (docs/proposals.md).
  c.proposals.source = ""
  # "unfitted": no mask has taught its ranking. "quality" and "fast", which uses
  # no network, were fitted on 100 masked photographs (docs/proposals.md). The
  # fields below change the preset's values.
  c.proposals.preset = "unfitted"
  c.proposals.network = True  # False: no features of an ImageNet network
  c.proposals.num_superpixels = 1600  # S
  c.proposals.max_proposals = 2000  # P; section 4.1: 4,000 of MCG
  c.proposals.max_side = 640  # images are shrunk to it before proposing
  c.proposals.num_workers = 0  # processes; 0 = one per core

  # Backbone.
  c.backbone = ml_collections.ConfigDict()
  c.backbone.name = "resnet_ws"  # or "resnet", "efficientnet_lite0"
  c.backbone.depth = 18  # of both ResNets: 18, 50, 101
  c.backbone.width = 1.0  # of both ResNets: factor on all channels
  c.backbone.norm = "frozen"  # of both ResNets: "frozen", "batch", "group"
  c.backbone.stride = 8  # pixels per cell of the feature map
  c.backbone.outputs = ("res5",)  # stages, concatenated
  c.backbone.projection = 0  # channels after a PCA of the stages; 0 = none
  # "": random. "imagenet": the weights of efficientnet_lite0 from the package
  # index. Or a file, .pkl, .pth or .safetensors (docs/pretrained.md).
  c.backbone.pretrained = ""
  # Up to which stage parameters keep their values: "all" (as the authors ran
  # it), "none", or the name of a stage.
  c.backbone.freeze = "all"
  c.backbone.cache = True  # features of a fully frozen backbone, on disk
  c.backbone.cache_dir = ""  # default WORKDIR/features
  # Of a split's features, for training or for evaluation: if they take more,
  # they are computed every time.
  c.backbone.cache_gib = 20.0

  # Proposal features (section 3.3).
  c.pooling = ml_collections.ConfigDict()
  # Table 1: or "tps" (shape-interpolation MoIPool), "roi", "roi_align".
  c.pooling.kind = "moi"
  c.pooling.output_size = (7, 7)
  # Of RoIAlign, also the instance branch's: points of a bin along each axis; 0
  # = as many as it has cells (authors' code).
  c.pooling.sampling_ratio = 2
  c.pooling.compensation = "bins"  # Eq. 7: "bins", "official", "features", ""
  c.pooling.availability = "any"  # Eq. 6: "any" or "coverage"
  c.pooling.reduce = "flatten"  # "mean" ties linear heads over the bins
  c.pooling.average = False  # the segment's average beside its maxima
  c.pooling.center = False  # subtract the mean proposal
  c.pooling.size_exponents = (0.0, 0.0)  # size cue of the maxima, the average

  # Neck and heads (section 3.2).
  c.neck = ml_collections.ConfigDict()
  c.neck.widths = (4096, 4096)
  c.neck.dropout = 0.5
  c.neck.input_dropout = 0.0  # of the pooled features
  c.neck.share_input_dropout = False  # one mask for all proposals of an image
  c.heads = ml_collections.ConfigDict()
  c.heads.num_refinements = 4  # n_r (Table 3)
  c.heads.zero_init = False

  # A classifier of cells that learns from tags; part of no paper, see
  # docs/beyond_the_paper.md.
  c.cells = ml_collections.ConfigDict()
  c.cells.enabled = False
  c.cells.dropout = 0.5
  c.cells.gain = 10.0  # factor on its logits: how fast it learns

  # Mining, see jtsm_jax.mining.labels.mine.
  c.mining = ml_collections.ConfigDict()
  c.mining.segments_per_thing = 1
  c.mining.segments_per_stuff = 3  # connected components are instances, too
  c.mining.score_ratio = 0.5
  c.mining.foreground_iou = 0.5
  c.mining.background_iou = (0.0, 0.5)
  c.mining.iou_kind = "masks"  # of segments; "boxes" in the authors' code

  # Segmentation branches (section 3.4, Table 2).
  c.instance = ml_collections.ConfigDict()
  c.instance.enabled = True
  c.instance.channels = 256
  c.instance.num_convs = 4
  c.semantic = ml_collections.ConfigDict()
  c.semantic.enabled = True
  c.semantic.channels = 256

  # Re-estimation of the mined segments (section 3.4).
  c.reestimation = ml_collections.ConfigDict()
  c.reestimation.init = "segment"  # "rectangle" (authors' code) or "none"
  c.reestimation.iterations = 5
  c.reestimation.longest_side = 400
  c.reestimation.threads = 0  # 0 = one per core
  c.reestimation.cache_dir = ""  # of masks; default WORKDIR/masks
  c.reestimation.lag = 0  # steps between mining and learning from the masks
  c.reestimation.start = 0  # step at which the branches begin to learn

  # Losses.
  c.losses = ml_collections.ConfigDict()
  c.losses.mil_reduction = "sum"  # over classes; "mean" in the authors' code
  c.losses.refinement_reduction = "mean"  # over proposals; Eq. 3: "sum"
  # Proposals of things that the instance branch learns from; Eq. 9: all.
  c.losses.instances_per_image = 64
  c.losses.weight_instances = True  # y of Eq. 9; False in the authors' code
  c.losses.mask_stride = 4  # canvas pixels per cell of a pseudo mask
  # Least share of an image that belongs to each tagged thing, and to each kind
  # of tagged stuff, for the cell head.
  c.losses.cell_shares = (0.12, 0.25)
  # In a training image the cell head's logits of classes without a tag are so
  # much lower. A cell that still looks like one of them teaches nothing: tags
  # do not name all that an image shows.
  c.losses.tag_advantage = 2.0

  # Training (section 4.1).
  c.train = ml_collections.ConfigDict()
  c.train.steps = 100_000
  c.train.batch_size = 4  # over all devices
  # Parts of a batch that follow one another, where memory is short; the result
  # is the same.
  c.train.accumulation = 1
  # "bfloat16": of features and matrix products; half the memory, and fast on
  # accelerators. Parameters, scores, losses and the optimizer stay float32.
  # "float32" is what the layers keep and add up in. What they multiply, a TPU
  # rounds to bfloat16 and a GPU from Ampere on to TF32 of 10 bits, jax's
  # default, unless the environment has JAX_DEFAULT_MATMUL_PRECISION=highest;
  # the projection, mining and the pooling do not round in any case.
  c.train.precision = "float32"
  # "backbone": its blocks are computed again in the backward pass, instead of
  # being kept for it: a third more work. Of use where the backbone learns.
  c.train.remat = ""
  # Proposals that are pooled at a time, a multiple of 8; the result is the
  # same, and pooling is done twice. 0 = all, which take P x 49 x C numbers an
  # image.
  c.train.proposal_block = 0
  # GiB of a device, where the estimate before the first step is to compare with
  # something else than what the device says. 0 = that.
  c.train.memory_gib = 0.0
  # Devices that share the neck's layers; the others share the batch.
  c.train.model_parallel = 1
  c.train.divide_optimizer = False  # its slots over the devices of the batch
  c.train.optimizer = "sgd"  # or "adamw"
  c.train.learning_rate = 0.01
  # The batch size that the rate is for: it grows with the batch. 0 = any.
  c.train.reference_batch_size = 0
  c.train.rise = 0  # steps in which the rate grows to its value
  c.train.boundaries = (70_000,)  # steps at which the rate drops tenfold
  c.train.momentum = 0.9
  c.train.weight_decay = 5e-4
  c.train.bias_lr_factor = 1.0  # 2 in the authors' code
  # A moving average of the weights, evaluated beside them; 0 = none.
  c.train.ema_decay = 0.0
  # Start with the weights of another run: its workdir, or one of its
  # checkpoints (--init_from). Patterns of paths that start anew, such as
  # ("params/heads/", "params/semantic/"), where the classes differ.
  c.train.init_from = ""
  c.train.init_skip = ()
  c.train.log_every = 20
  # Pictures of what is mined, in TensorBoard, also in the last step; 0 = none.
  c.train.images_every = 1000
  c.train.checkpoint_every = 1000
  c.train.keep_checkpoints = 2  # the last ones; the best one is kept besides
  # 0 = not while it trains. One device does it: a test image costs as much as
  # several training images (docs/reproduce.md).
  c.train.evaluate_every = 20_000
  c.train.loader_threads = 2  # that make batches
  # Processes that make batches, each with so many threads; for hosts of many
  # cores. 0: this process makes them.
  c.train.loader_workers = 0
  c.train.calibration_images = 64

  # Tag warm-up of a backbone that starts from scratch; part of no paper.
  c.warm_up = ml_collections.ConfigDict()
  c.warm_up.steps = 0  # before the `train.steps`
  c.warm_up.batch_size = 32
  c.warm_up.learning_rate = 1e-3
  c.warm_up.weight_decay = 0.05

  # Inference and fusion.
  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.batch_size = 4
  # At test time scores are averaged over those of an image's orientation.
  # Section 4.1: short sides 480, 576, 688, 864 and 1200.
  c.evaluation.canvases = tuple(
    canvas
    for short, long in (
      (480, 640),
      (576, 768),
      (688, 928),
      (864, 1152),
      (1200, 1600),
    )
    for canvas in ((short, long), (long, short))
  )
  # Proposals that are pooled at a time, a multiple of 8, where memory is short:
  # all of them take P x 49 x C numbers an image. 0 = all.
  c.evaluation.proposal_block = 0
  c.evaluation.flip = True  # average over mirror images, too
  c.evaluation.ema = False  # the averaged weights, also for predict and export
  c.evaluation.voc_metric = "area"  # of boxes; "11point" for VOC 2007
  c.evaluation.calibrate = False  # class thresholds from the training tags
  # The best detection of each thing that an image shows, by those thresholds,
  # is sure enough for the panoptic map.
  c.evaluation.show_present = False
  # Of GrabCut on the detections' masks: their outlines follow the colours.
  c.evaluation.outline_rounds = 0
  c.evaluation.mil_share = 0.0  # of S^MIL in the average of the heads
  c.evaluation.mask_share = 1.0  # of the instance branch, against proposals
  c.evaluation.semantic_share = 1.0  # of the semantic branch, against votes
  c.evaluation.thing_channel = True  # no stuff where the branch finds a thing
  c.evaluation.nms_iou = 0.5
  c.evaluation.nms_kind = "masks"  # whose IoU; "boxes" in the authors' code
  c.evaluation.max_detections = 100
  c.evaluation.instance_score = 0.5
  c.evaluation.instance_overlap = 0.5
  c.evaluation.stuff_area = 4096 / (500 * 375)  # share of the image
  c.evaluation.pictures = 12

  # The gallery of --mode=report.
  c.report = ml_collections.ConfigDict()
  c.report.images = 200  # validation images; the worst, and some of the others
  c.report.train_images = 24  # whose mined segments are shown
  return c.lock()  # a misspelt field is an error, not a new one
