"""How each stage's settings are read from a command line, its own or that of this process.

Nothing here imports torch, so that an entry script answers `--help` and wrong settings at once.
"""

from functools import partial

from models.build import classifier_config_problems, mae_config_problems
from util.settings.evaluation import STAGE_CONFIGS, FinetuneConfig, KnnConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

read_pretrain = partial(
    load_config, PretrainConfig, "pretrain", checks=[mae_config_problems], siblings=STAGE_CONFIGS
)
read_finetune = partial(
    load_config,
    FinetuneConfig,
    "finetune",
    checks=[classifier_config_problems],
    siblings=STAGE_CONFIGS,
)
read_lincls = partial(
    load_config,
    LinclsConfig,
    "lincls",
    checks=[classifier_config_problems],
    siblings=STAGE_CONFIGS,
)
read_knn = partial(
    load_config, KnnConfig, "knn", checks=[classifier_config_problems], siblings=STAGE_CONFIGS
)
