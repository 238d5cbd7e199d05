"""The settings of segmentation and detection, beside those of classification (see
`util/settings/evaluation.py`)."""

from typing import Literal

from util.errors import where
from util.settings.base import Count, CountOrZero, DataConfig, PathText, Positive, Settings, setting

# Smallest and largest scale of a random crop where nothing is stated: of segmentation the usual
# one, of detection large-scale jitter (arXiv 2012.07177).
SCALES = {"segment": (0.5, 2.0), "detect": (0.1, 2.0)}
# Settings of any stage that have an effect for some tasks alone, and which; for others they are
# refused.
OF_TASKS = {
    "classify": (
        *("labels", "class_weights", "crop_min", "crop_pct", "data_on_device", "dicom_frames"),
        *("compile", "lora_rank", "auto_augment", "color_jitter", "re_prob", "mixup", "cutmix"),
        *("save_path", "load_path"),
    ),
    "segment": (
        *("class_file", "ignore_index", "zero_is_ignored", "eval_mode", "dense_head"),
        "memory_patches",
    ),
    "detect": ("train_json", "val_json", "instance_masks", "region_samples"),
    "segment or detect": ("scale_min", "scale_max", "head_dim", "window_size", "global_blocks"),
}
OF_FILES = ("class_file", "ignore_index", "zero_is_ignored", "train_json", "val_json")


class DenseDataConfig(DataConfig):
    """Segmentation and detection data"""

    class_file: PathText | None = setting(
        None,
        "File of the class names, one per line, in the order of the masks' values; null numbers "
        "the classes, of which num_classes says how many there are.",
    )
    ignore_index: CountOrZero = setting(
        255, "Value of mask pixels that belong to no class and do not count."
    )
    zero_is_ignored: bool = setting(
        False,
        "Whether mask pixels of 0 do not count and 1 is the first class, as in ADE20K's files.",
    )
    train_json: PathText | None = setting(
        None,
        "COCO file of the training images' objects; null looks for "
        "annotations/instances_train*.json in data_path.",
        may_change=True,  # the resume compares its content instead
    )
    val_json: PathText | None = setting(
        None,
        "COCO file of the validation images' objects; null looks for "
        "annotations/instances_val*.json in data_path.",
        may_change=True,
    )
    scale_min: Positive | None = setting(
        None,
        "Smallest random scale of a training image, 1 being that of the evaluation, before img_size"
        " is cut from it; null is 0.5 for segment and 0.1 for detect.",
    )
    scale_max: Positive | None = setting(
        None, "Largest random scale of a training image; null is 2."
    )
    eval_mode: Literal["whole", "slide"] = setting(
        "whole",
        "How an image is segmented whose shorter side is resized to img_size: at once (whole), or "
        "by windows of img_size that overlap by a third, whose logits are averaged (slide).",
    )

    def scales(self, task: str) -> tuple[float, float]:
        """The smallest and largest random scale of a task."""
        low, high = SCALES[task]
        return self.scale_min or low, self.scale_max or high

    def problems(self) -> list[str]:
        task = getattr(self, "task", "classify")
        is_classify, fields = task == "classify", type(self).model_fields
        of_files = [
            name
            for name in OF_TASKS[task]
            if name in OF_FILES and getattr(self, name) != fields[name].default
        ]
        low, high = (1.0, 1.0) if is_classify else self.scales(task)
        return super().problems() + where(
            (
                not is_classify and self.dataset not in ("folder", "digits_scenes"),
                f"dataset {self.dataset} has no masks or boxes: task {task} takes folder and "
                "digits_scenes",
            ),
            (
                is_classify and self.dataset == "digits_scenes",
                "dataset digits_scenes has masks and boxes, and no class of an image: it goes with "
                "task segment and detect, and with pretraining",
            ),
            *(
                (
                    task not in tasks.split(" or ") and getattr(self, name) != fields[name].default,
                    f"{name} is for task {tasks}: leave it out for task {task}",
                )
                for tasks, names in OF_TASKS.items()
                for name in names
                if name in fields
            ),
            (
                self.dataset == "digits_scenes" and of_files,
                f"{' '.join(of_files[:1])} is about files: leave it out for dataset digits_scenes",
            ),
            (low > high, f"scale_min {low:g} is above scale_max {high:g}"),
            (
                self.zero_is_ignored and self.ignore_index == 0,
                "zero_is_ignored makes 1 the first class: it needs an ignore_index above 0",
            ),
        )


class DenseModelConfig(Settings):
    """Segmentation and detection model"""

    dense_head: Literal["linear", "fpn"] = setting(
        "fpn",
        "Head of task segment: a linear layer on each patch (linear), or a pyramid of four scales "
        "made of the last features and summed from the top down (fpn).",
    )
    instance_masks: bool = setting(
        True, "Whether task detect also predicts a mask of each object (Mask R-CNN)."
    )
    head_dim: Count = setting(256, "Number of channels of the pyramid and of the heads on it.")
    region_samples: Count = setting(
        512,
        "Number of boxes of an image that the second stage of task detect is trained on; half as "
        "many anchors train the first.",
    )
    window_size: Count | None = setting(
        None,
        "Side of the windows, in patches, within which blocks of segment and detect attend; null "
        "attends to the whole image in all blocks.",
    )
    global_blocks: CountOrZero = setting(
        4,
        "Number of blocks, evenly spaced with the last one among them, that attend to the whole "
        "image in spite of window_size.",
    )
