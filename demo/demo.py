#!/usr/bin/env python
"""
Run a trained model on images, a video or a webcam, and show or save the predictions.

    python demo/demo.py --config-file X.yaml --input a.jpg folder 'more/*.png' --output pictures \\
        --json results.json --opts MODEL.WEIGHTS model_final.pth

Exit status: 0 on success, 1 if an input could not be used or nothing could be done.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import RotatedBoxes
from matplotlib import font_manager, rcParams
from PIL import Image
from tqdm import tqdm

from panet_d2 import cli
from panet_d2.checkpoint import atomic_open
from panet_d2.data.image_file import read_image_file
from panet_d2.engine import Predictor, setup_config, use_run_weights
from panet_d2.errors import ConfigError, DataError

if TYPE_CHECKING:
    import cv2  # imported where it is used, because a server may lack OpenCV

IMAGES = (".png", ".bmp", ".jpeg", ".jpg", ".ppm", ".tif", ".tiff", ".webp")
# Codecs for each kind of video, best first. The build of OpenCV decides which codecs work.
VIDEOS = {".mp4": ("mp4v", "avc1"), ".avi": ("MJPG", "XVID"), ".mkv": ("mp4v", "MJPG")}
_COMPLETE = 0.9  # share of its frames that a complete video has at least
WINDOW, NO_KEY, QUIT_KEYS = "panet_d2", 255, (27, ord("q"))  # 27 is Esc


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse a command line; see :func:`main` for arguments and errors."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the model's config")
    source = parser.add_mutually_exclusive_group(required=True)
    text = "images, folders of images (without their subfolders), glob patterns"
    source.add_argument("--input", nargs="+", metavar="PATH", help=text)
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", nargs="?", type=int, const=0, help="its number; Ctrl-C ends it")
    text = """where to save pictures or video: a folder, made if absent, or a file for one image
        or a video; without --output and --json a window opens: q or Esc quits, other keys go on"""
    parser.add_argument("--output", metavar="PATH", help=text)
    text = """save the detections in COCO's result format; image_id is the image's file name as
        given or found, in a video the number of the frame from 0; each has its file_name, too"""
    parser.add_argument("--json", metavar="FILE", help=text)
    text = "leave out what scores lower; from 0 to 1, default 0.5"
    parser.add_argument("--confidence-threshold", type=float, default=0.5, metavar="P", help=text)
    text = "config overrides KEY VALUE ..., such as MODEL.WEIGHTS model_final.pth; must come last"
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY", help=text)
    args = parser.parse_args(argv)
    if not 0 <= args.confidence_threshold <= 1:
        parser.error("--confidence-threshold must be from 0 to 1")
    return args


def say(message: str) -> None:
    """Print one line to stderr without breaking the progress bar."""
    tqdm.write(" ".join(message.split()), file=sys.stderr)


def drawable(names: Sequence[str], numbers: Sequence[int]) -> List[str]:
    """
    Choose an installed font with the letters of these names for matplotlib, and return the names.
    If the font lacks letters of a name, return the name's number instead, and print a message.
    """

    def lacking(path: str) -> List[str]:
        try:
            letters = font_manager.get_font(path).get_charmap().keys()
        except Exception:  # fonts that matplotlib cannot draw, such as colored emoji
            return list(names)
        return [name for name in names if not set(map(ord, f"{name}0%")) <= letters]

    # Detectron2 draws with this family. Matplotlib takes its first installed font.
    path = font_manager.findfont(font_manager.FontProperties(family=["sans-serif"]))
    lost = lacking(path)
    for path in sorted(font_manager.findSystemFonts()) if lost else ():
        without = lacking(path)
        if len(without) < len(lost):
            lost = without
            font_manager.fontManager.addfont(path)
            family = font_manager.get_font(path).family_name
            rcParams["font.sans-serif"] = [family, *rcParams["font.sans-serif"]]
    if lost:
        say(
            f"no installed font can draw {', '.join(lost)}, so pictures have the numbers of these "
            "categories; install a font with their letters, such as Noto Sans CJK for Chinese"
        )
    return [str(n) if name in lost else name for name, n in zip(names, numbers)]


class Model:
    """A model with the class names and ids to draw and save its output."""

    def __init__(self, args: argparse.Namespace):
        """Build the model; raise the errors of panet_d2.engine.setup_config and Predictor."""
        cfg = setup_config(args.config_file, args.opts, needed=())
        given = cfg.MODEL.WEIGHTS
        if use_run_weights(cfg, args.opts, args.config_file) != given:
            say(f"weights: {cfg.MODEL.WEIGHTS}, the last checkpoint of this run")
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
        cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = args.confidence_threshold
        channels = len(cfg.MODEL.PIXEL_MEAN)
        if channels not in (1, 3):
            raise ConfigError(
                f"MODEL.PIXEL_MEAN has {channels} values, but the demo's images have colors or "
                "grays; give your own arrays to panet_d2.engine.Predictor."
            )
        self.predictor, self.threshold = Predictor(cfg), args.confidence_threshold
        categories = self.predictor.cfg.DATASETS.CATEGORIES
        self.category_ids = [category_id for category_id, _ in categories]
        known = self.predictor.metadata.as_dict()
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":  # whose output is not drawn without names
            for kind, node in (("thing", cfg.MODEL.ROI_HEADS), ("stuff", cfg.MODEL.SEM_SEG_HEAD)):
                known.setdefault(f"{kind}_classes", [str(i) for i in range(node.NUM_CLASSES)])
        if not categories:
            say(
                "category ids count from 0, because neither the dataset nor DATASETS.CATEGORIES "
                "nor the weights have the names and ids of the classes"
            )
        if args.output or not args.json:
            for key, ids in (("thing_classes", self.category_ids), ("stuff_classes", [])):
                if key in known:
                    known[key] = drawable(known[key], ids or range(len(known[key])))
        self.metadata = Metadata(**known)
        self.video: Any = None
        if args.video_input or args.webcam is not None:
            from detectron2.utils.video_visualizer import VideoVisualizer  # imports cv2

            # An object keeps its color from frame to frame.
            self.video = VideoVisualizer(self.metadata)

    def predict(self, image: np.ndarray) -> Dict[str, Any]:
        """Return the model's output for a BGR image, without instances below the threshold."""
        outputs = self.predictor(image)
        if "instances" in outputs:  # Soft-NMS, voting and fusion lower scores after the threshold
            found = outputs["instances"]
            outputs["instances"] = found[found.scores >= self.threshold]
        return outputs

    def draw(self, image: np.ndarray, outputs: Dict[str, Any]) -> np.ndarray:
        """Return a BGR picture of a BGR image and the model's output for it."""
        from detectron2.utils.visualizer import Visualizer  # imports cv2

        method, arguments = "draw_instance_predictions", [outputs["instances"].to("cpu")]
        if "panoptic_seg" in outputs:
            segments, info = outputs["panoptic_seg"]
            method, arguments = "draw_panoptic_seg_predictions", [segments.to("cpu"), info]
        rgb = image[:, :, ::-1]
        if self.video is None:
            drawn = getattr(Visualizer(rgb, self.metadata), method)(*arguments)
        else:
            drawn = getattr(self.video, method)(rgb, *arguments)
        return np.ascontiguousarray(drawn.get_image()[:, :, ::-1])

    def results(self, outputs: Dict[str, Any], image_id: Any, file_name: str) -> List[dict]:
        """Return the detections in the form of ``--json``; may move the keypoints of outputs."""
        found = outputs["instances"].to("cpu")
        results = instances_to_coco_json(found, image_id)
        if isinstance(found.pred_boxes, RotatedBoxes):  # Detectron2 takes them for corners
            for result, box in zip(results, found.pred_boxes.tensor.tolist()):
                result["bbox"] = box
        for result in results:
            number = result["category_id"]
            known = number < len(self.category_ids)
            category_id = self.category_ids[number] if known else number
            result.update(category_id=category_id, file_name=file_name)
        return results


def find_images(given: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return the images at these paths, and the paths without any; DataError if no images."""
    images: Dict[str, str] = {}
    empty = []
    for path in map(os.path.expanduser, given):
        found = [path]
        if not os.path.isfile(path):
            pattern = os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path
            found = [p for p in sorted(glob.glob(pattern)) if p.lower().endswith(IMAGES)]
        images.update({os.path.abspath(p): p for p in found})
        empty += [] if found else [path]
    if not images:
        raise DataError(f"no image found in {', '.join(empty)}")
    for path in empty:
        say(f"no image found in {path}")
    return list(images.values()), empty


def read_images(paths: Sequence[str], failed: List[str]) -> Iterator[Tuple[str, str, np.ndarray]]:
    """Yield (image_id, file name, BGR image), and add unreadable files to ``failed``."""
    for path in paths:
        try:
            image = read_image_file(path)
        except DataError as e:
            say(str(e))
            failed.append(path)
        else:
            yield path, path, image


def read_frames(
    capture: cv2.VideoCapture, name: str, total: int
) -> Iterator[Tuple[int, str, np.ndarray]]:
    """
    Yield (image_id, file name, BGR image); raise DataError if there is no frame. Say if there are
    fewer than ``total``, which is a video's own count and not exact.
    """
    index, (there_is_one, frame) = 0, capture.read()
    if not there_is_one:
        raise DataError(f"no frame can be read from {name}")
    while there_is_one:
        yield index, name, frame
        index, (there_is_one, frame) = index + 1, capture.read()
    if index < _COMPLETE * total:
        say(f"{name} ends after {index} of about {total} frames; the file may be damaged")


def open_writer(file: str, fps: float, picture: np.ndarray) -> cv2.VideoWriter:
    """Open a video file for pictures of this size; raise DataError if no codec works."""
    import cv2

    codecs = VIDEOS[Path(file).suffix.lower()]
    for codec in codecs:
        writer = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*codec), fps, picture.shape[1::-1])
        if writer.isOpened():
            return writer
    raise DataError(f"OpenCV cannot write the video {file} (codecs tried: {', '.join(codecs)})")


def output_files(names: Sequence[str], output: str, endings: Sequence[str]) -> Dict[str, str]:
    """
    Return the output file of each of ``names``: ``output``, or a file in this folder. Each file has
    one of ``endings``, by default the first. Raise DataError if the names cannot have different
    files.
    """
    if os.path.isdir(output) or output.endswith(("/", os.sep)) or not Path(output).suffix:
        files = [os.path.join(output, os.path.basename(name)) for name in names]
        files = [f if f.lower().endswith(tuple(endings)) else f + endings[0] for f in files]
        if len(set(files)) < len(files):
            raise DataError(f"several images would be saved as {max(files, key=files.count)}")
        return dict(zip(names, files))
    if not output.lower().endswith(tuple(endings)):
        raise DataError(f"--output {output} must be a folder or end in {', '.join(endings)}")
    if len(names) > 1:
        raise DataError(f"--output {output} is one file, but there are {len(names)} images")
    return {names[0]: output}


def check_display() -> None:
    """Raise DataError if no window can be opened."""
    # Tried in another process, because OpenCV may use Qt, and Qt ends the process if it fails.
    code = "import cv2; cv2.namedWindow('w'); cv2.destroyAllWindows()"
    try:
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    except subprocess.SubprocessError as e:
        raise DataError("no window can be opened here; save to files with --output") from e


def show(picture: np.ndarray, delay: int) -> bool:
    """Show a BGR picture for ``delay`` ms, or until a key if 0; return whether to go on."""
    import cv2

    cv2.imshow(WINDOW, picture)
    while True:
        key = cv2.waitKey(delay or 50) & NO_KEY
        if key in QUIT_KEYS or cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1:
            return False
        if delay or key != NO_KEY:
            return True


def predict(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code; raise the errors that :func:`main` reports."""
    failed: List[str] = []
    if args.input:
        names, failed = find_images(args.input)
        items, total, endings = read_images(names, failed), len(names), IMAGES
    else:
        import cv2

        names = [args.video_input or f"webcam-{args.webcam}"]
        capture = cv2.VideoCapture(args.video_input or args.webcam)
        if not capture.isOpened():
            raise DataError(f"cannot open {names[0]} as a video")
        total = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # webcams have none
        items, endings = read_frames(capture, names[0], total), tuple(VIDEOS)
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps if 0 < fps < 1000 else 30.0  # with a wrong one the writer does not open
    given = len(names) + len(failed)
    files = output_files(names, args.output, endings) if args.output else {}
    to_write = [*files.values(), *filter(None, [args.json])]
    weights = [value for key, value in zip(args.opts, args.opts[1:]) if key == "MODEL.WEIGHTS"]
    cli.make_way(to_write, [*names, args.config_file, *weights])
    if not to_write:
        check_display()
    model, results, unwritten = Model(args), [], False
    writer: Optional[cv2.VideoWriter] = None
    try:
        for image_id, name, image in tqdm(items, total=total or None, disable=not to_write):
            try:
                outputs = model.predict(image)
            except DataError as e:
                if not args.input:  # later frames are no better
                    raise
                say(f"cannot use image {name}: {e}")
                failed.append(name)
                continue
            if args.output and args.input:
                picture = Image.fromarray(model.draw(image, outputs)[:, :, ::-1])
                try:
                    picture.save(files[name], quality=95)
                except (OSError, ValueError) as e:  # a size that the format cannot have
                    say(f"cannot write {files[name]}: {e}")
                    unwritten = True
            elif args.output:
                picture = model.draw(image, outputs)
                writer = writer or open_writer(files[name], fps, picture)
                writer.write(picture)
            elif not args.json and not show(model.draw(image, outputs), 0 if args.input else 1):
                break
            if args.json:  # after drawing: results() may move keypoints
                results += model.results(outputs, image_id, name)
    except KeyboardInterrupt:
        if args.webcam is None:
            raise
    finally:
        if writer:
            writer.release()
    if args.json and len(failed) < given:
        with atomic_open(args.json) as f:
            json.dump(results, f)
    if failed and given > 1:
        say(f"{len(failed)} of {given} inputs could not be used")
    return 1 if failed or unwritten else 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Args:
        argv (list[str] or None): the command line, without the program; None for the real one.

    Returns:
        int: the exit code, as described at the top of this file.

    Raises:
        SystemExit: if argparse does not understand the command line; its code is 2.
    """
    args = parse(argv)
    return predict(args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
