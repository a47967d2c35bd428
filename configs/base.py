"""Every key of every experiment, with the values of the reference's own defaults; an experiment changes what it needs.

Keys are independent: what follows from others (steps, peak learning rate) is derived in the code, so that overriding
one key on the command line never leaves another one stale. Sections of papers: v1 is arXiv 2002.05709, v2 2006.10029.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the unlocked configuration that the experiments start from."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # Of parameters, data order and augmentation.
  c.batch_size = 512  # Images (not views) in a global batch, over all devices.
  c.total_epochs = 100.0
  c.total_steps = 0  # Above 0: so many steps in place of total_epochs.
  c.micro_batches = 1  # Parts of a batch that go through the network one after the other; BatchNorm sees one part.
  c.eval_batch_size = 256  # Over all devices; changes speed only, every example counts once.

  c.data = ml_collections.ConfigDict()
  c.data.source = "tfds"  # tfds | folder | arrays (an .npz file) | shapes (built in).
  c.data.name = "cifar10"  # Of the TFDS data set, with /config where it has one.
  c.data.dir = ""  # TFDS data_dir ("" is its default), the folder of images, or the .npz file.
  c.data.train_split = "train"  # Sub-splits too: train[:90%].
  c.data.eval_split = "test"  # "" pretrains without looking at held-out images.
  c.data.image_size = 32  # Pixels, what the network sees.
  c.data.shards = 16  # Parts with an order of their own; hosts divide them, they divide the batch.
  c.data.shuffle_window = 2048  # Records of a part shuffled together where the data does not fit in memory.
  c.data.cache = True  # Keep the encoded images in memory; each epoch is then one full permutation of a part.
  c.data.resident = False  # Keep all images, of one size, decoded on every device: for what fits; nothing is fed then.
  c.data.steps_per_dispatch = 20  # At most, of resident data.
  c.data.examples = 0  # Images in a split of the built-in shapes; 0: the source's own number.
  c.data.max_bad_share = 0.01  # Of the images in a folder that may be corrupt before the run stops.

  c.augment = ml_collections.ConfigDict()
  # device: the host crops and flips, colours and blur are part of the step. host: all in tf.data, as the reference.
  c.augment.place = "device"
  c.augment.dtype = "float32"  # Of the device's part: bfloat16 | float32 | float64.
  c.augment.resize = (
    "bicubic"  # Of the host's crops where place is device: bicubic (the reference's) | bilinear, faster.
  )
  c.augment.min_area = 0.08  # Of a random crop, as a share of the image.
  c.augment.max_area = 1.0
  c.augment.flip = True
  c.augment.color_strength = 1.0  # v1 appendix A: 1.0 for ImageNet, 0.5 for CIFAR-10.
  c.augment.brightness = "multiplicative"  # multiplicative (v2) | additive (v1).
  c.augment.color_probability = 0.8
  c.augment.grayscale_probability = 0.2
  c.augment.blur_probability = 0.5  # 0 for CIFAR-10.
  # v1 figure 5, in place of all of the above but min_area and max_area: both views are one random crop, the second one
  # goes through these as well, one after the other: crop | cutout | color | sobel | noise | blur | rotate.
  c.augment.compose = ""

  c.model = ml_collections.ConfigDict()
  c.model.depth = 50  # 10, 18, 34, 50, 101, 152, 200.
  c.model.width = 1.0
  c.model.sk_ratio = 0.0  # 0.0625 turns on selective kernels and the ResNet-D stem and shortcuts.
  c.model.se_ratio = 0.0
  c.model.small_images = False  # CIFAR stem: 3x3 stride 1, no pooling.
  c.model.dtype = "float32"  # Of activations: bfloat16 | float32 | float64. Statistics and loss are at least float32.
  c.model.param_dtype = "float32"
  # What the backward pass computes again instead of keeping: none | convs (all but convolutions) | blocks (whole
  # residual blocks), for all block groups or one each: blocks,convs,none,none.
  c.model.remat = "none"

  c.head = ml_collections.ConfigDict()
  c.head.layers = 3  # Of the projection head: 0 none, 1 linear, 2 in v1, 3 in v2.
  c.head.out_dim = 128
  # Which layer's output feeds the classifier: 0 is the encoder's h, 1 the first layer, ..., -1 the last one, z.
  c.head.finetune_from = 0  # Of finetune; v2 takes 1 for 1 % and 10 % of the labels. The layers up to it learn too.
  c.head.evaluate_from = 0  # Of linear_eval, knn, transfer and embed.
  c.head.online = True  # Train a linear classifier beside it, behind stop_gradient, where the images have labels.

  c.loss = ml_collections.ConfigDict()
  # nt_xent | dcl (the positive left out of the denominator) | sup_con (same label attracts); those of v1 table 4:
  # margin | margin_semi_hard | nt_logistic | nt_logistic_semi_hard.
  c.loss.kind = "nt_xent"
  c.loss.temperature = 0.1
  c.loss.normalize = True  # L2-normalise the embeddings.
  c.loss.margin = 0.8  # Of the two margin losses.
  c.loss.scale = 2.0  # Times the paper's mean over 2N; the reference sums two means over N. Metrics log the paper's.

  c.optimizer = optimizer(name="lars", base_learning_rate=0.3, warmup_epochs=10.0, weight_decay=1e-6)

  c.memory = ml_collections.ConfigDict()  # v2 section 3.1, after MoCo: what older batches embedded, as more negatives.
  c.memory.size = 0  # Embeddings that are kept, 65536 in v2; 0: none.
  c.memory.decay = 0.999  # Of the moving average of the weights that embed them.

  c.sharding = ml_collections.ConfigDict()
  c.sharding.parameters = "replicated"  # replicated | sharded: parameters and optimizer state split over the devices.

  c.log_every_steps = 50
  c.evaluate_every_epochs = 10.0  # What pretrain measures beside the loss (see monitor); 0: at the end only.
  c.monitor = ml_collections.ConfigDict()
  c.monitor.knn_images = 5000  # Training images whose features vote on eval_split; 0: no online kNN.
  c.monitor.knn_neighbours = 20  # All where there are fewer images.
  c.monitor.pairs = 512  # Of views, for alignment, uniformity and effective rank; 0: none of these.
  c.checkpoint_every_epochs = 1.0
  c.checkpoint_every_steps = 0  # Above 0: in place of checkpoint_every_epochs.
  c.keep_checkpoints = 3  # The latest so many stay.
  c.keep_every_epochs = 0.0  # Checkpoints at multiples of this stay for good; 0 for none.

  # What the jobs after pretraining start from: a run's workdir, a folder in its checkpoints, or `random`.
  c.checkpoint = ""
  c.labels = ml_collections.ConfigDict()  # Of which part of train_split finetune, linear_eval, distill, knn see labels.
  c.labels.fraction = 1.0  # Of the images of each class.
  c.labels.seed = 0  # Which of them.
  c.labels.ids = ""  # A file with one image name a line (as the reference's imagenet_subsets), in place of a fraction.
  c.linear_eval = recipe(
    # v1 appendix B.6: Nesterov momentum, 0.1 for each 256 images, no warm-up, no weight decay, crop and flip.
    optimizer=optimizer(name="momentum", base_learning_rate=0.1, warmup_epochs=0.0, weight_decay=0.0),
    batch_size=512,
    total_epochs=100.0,
  )
  # reference (v1 appendix B.6) | features (one pass, then many classifiers) | stored (count the checkpoint's own one).
  c.linear_eval.protocol = "reference"
  c.probes = ml_collections.ConfigDict()  # What linear_eval does with protocol = "features".
  c.probes.passes = 1  # Over the training images: one as they are counted, the others cropped and flipped.
  c.probes.learning_rates = "0.01,0.03,0.1,0.3,1.0,3.0"  # Each for 256 images, linearly scaled; one grid with
  c.probes.weight_decays = "0.0,1e-6,1e-5,1e-4"  # all of these.
  c.probes.epochs = 100
  c.probes.batch_size = 512
  c.probes.l2_strengths = "1e-6,1e-5,1e-4,1e-3,1e-2"  # Of logistic regression on standardised features.
  c.probes.lbfgs_steps = 500  # At most, for each strength.
  c.probes.lbfgs_tolerance = 1e-4  # Of the largest entry of the gradient; scikit-learn has the same.
  c.probes.validation_share = 0.1  # Of the training images; these choose the setting.
  c.finetune = recipe(
    # v1 appendix B.5; from scratch (no checkpoint) it is the supervised baseline.
    optimizer=optimizer(name="momentum", base_learning_rate=0.05, warmup_epochs=0.0, weight_decay=0.0),
    batch_size=512,
    total_epochs=60.0,
  )
  c.finetune.after_block = -1  # What learns: -1 all, 0 what follows the stem, 1 to 4 what follows that block group.
  c.distill = recipe(
    # v2 section 3.3: LARS as in pretraining, 400 epochs, crop and flip.
    optimizer=optimizer(name="lars", base_learning_rate=0.1, warmup_epochs=10.0, weight_decay=1e-4),
    batch_size=512,
    total_epochs=400.0,
  )
  c.distill.optimizer.scaling = "sqrt"
  c.distill.zero_init = False
  c.distill.teacher = ""  # A run of finetune, linear_eval or distill (or of pretrain: its online classifier).
  c.distill.temperature = 1.0  # v2: 1.0 from a big network to a small one, 0.1 for self-distillation.
  c.distill.label_weight = 0.0  # 1 - alpha of v2's equation 3: of the cross-entropy of the images with labels.
  c.distill.images = "all"  # all | labelled: what the student sees of train_split.
  c.distill.cache_teacher = False  # Run the teacher once, on the centre crop, rather than on each crop of each step.
  c.knn = ml_collections.ConfigDict()
  c.knn.neighbours = "10,20,100,200"
  c.knn.temperatures = "0.07,0.1"  # Votes weigh exp(similarity / temperature); the first of both is the headline.
  c.transfer = ml_collections.ConfigDict()  # v1 appendix B.8.
  # TFDS names, or NAME:TRAIN:VALIDATION:TEST splits, or folder:DIR; paper: its twelve.
  c.transfer.datasets = "paper"
  c.transfer.l2_strengths = 45  # So many, evenly spaced in the logarithm,
  c.transfer.l2_low = 1e-6  # from here
  c.transfer.l2_high = 1e5  # to here; on sums over examples, as in the paper.
  c.transfer.lbfgs_steps = 1000  # At most, for each strength.
  c.transfer.lbfgs_tolerance = 1e-4
  c.transfer.validation_share = 0.2  # Of the training images of a data set that has no validation split.
  c.embed = ml_collections.ConfigDict()
  c.embed.split = "train"
  c.embed.format = "npz"  # npz | parquet.
  c.embed.rows_per_file = 8192
  return c


def optimizer(*, name: str, base_learning_rate: float, warmup_epochs: float, weight_decay: float):
  """Returns the keys of an optimizer and its schedule."""
  c = ml_collections.ConfigDict()
  c.name = name  # lars | momentum (Nesterov) | adam.
  c.base_learning_rate = base_learning_rate
  c.scaling = "linear"  # linear: base * batch_size / 256. sqrt: base * sqrt(batch_size).
  c.warmup_epochs = warmup_epochs
  c.momentum = 0.9
  c.weight_decay = weight_decay
  c.trust_coefficient = 0.001  # LARS only.
  return c


def recipe(*, optimizer, batch_size: int, total_epochs: float):
  """Returns the keys of a job that trains a classifier on the encoder."""
  c = ml_collections.ConfigDict()
  c.optimizer = optimizer
  c.batch_size = batch_size
  c.total_epochs = total_epochs
  c.min_area = 0.08  # Of the random crop.
  c.zero_init = True  # Of the classifier.
  c.evaluate_every_epochs = 0.0  # On eval_split while training; 0: at the end only.
  return c
