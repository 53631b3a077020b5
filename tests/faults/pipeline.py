"""Faults in data, weights, training and evaluation."""

from __future__ import annotations

from faults.base import fault

PUBLISHED = "tests/test_published.py"
PUBLISHED_TRAINING = "tests/test_published_training.py"
SAMPLING = "cast/video/sampling.py"
AUGMENT = "cast/video/augment.py"
GROUPS = "cast/training/groups.py"
LISTS = "cast/video/annotations.py"
FOLDERS = "cast/video/frame_folders.py"
FOLDERS_TEST = "tests/test_video_frame_folders.py"
SIDES = "tests/test_short_side.py -k evaluat"
ORIENTATION, FOLDER = "cast/video/orientation.py", "cast/video/folder.py"

FAULTS = [
    # --- the published data pipeline and training
    fault("dense training reaches the last frame", f"{PUBLISHED}::test_training_clips",
          (SAMPLING, "rng.integers(length - window))\n", "rng.integers(length - window + 1))\n")),
    fault("short dense views stretched", f"{PUBLISHED}::test_views_of_the_test",
          (SAMPLING, 'if sampling == "uniform":\n        part',
           'if sampling == "uniform" or length < frames:\n        part')),
    fault("pre-training's last step reaches the last frame", f"{PUBLISHED}::test_pre_training_clips",
          (SAMPLING, "max(length - 2, 0) // stride", "max(length - 1, 0) // stride")),
    fault("centre crop cut off instead of rounded", f"{PUBLISHED}::test_crops_of_the_test",
          ("cast/video/transforms.py", "round(room / 2) if self.crops == 1", "room // 2 if self.crops == 1")),
    fault("multi-scale sides snap within three pixels", f"{PUBLISHED}::test_multiscale_sides_snap_within_two_pixels",
          (AUGMENT, "_SNAP = 3", "_SNAP = 4")),
    fault("erased area to 0.33", f"{PUBLISHED}::test_random_erasing", (AUGMENT, "(0.02, 1 / 3)", "(0.02, 0.33)")),
    fault("ten tries of erasing", f"{PUBLISHED}::test_random_erasing",
          (AUGMENT, "-math.log(0.3)), 100", "-math.log(0.3)), 10")),
    fault("CLIP's positions without weight decay", f"{PUBLISHED_TRAINING}::test_parameter_groups",
          (GROUPS, "_pos|time_positional_embedding", "_pos|positional_embedding")),
    fault("CLIP's first norm at the heads' rate", f"{PUBLISHED_TRAINING}::test_parameter_groups",
          (GROUPS, "positional_embedding|ln_pre)\"\n", "positional_embedding)\"\n")),
    fault("views averaged in float32", "tests/test_published_results.py -k averaged_in_float64",
          ("cast/metrics/accuracy.py", "logits.cpu().double()", "logits.cpu().float()")),
    fault("Glorot between encoder and decoder", f"{PUBLISHED_TRAINING}::test_initialisation",
          ("cast/pretrain/model.py", "for part in (self.encoder, self.decoder):", "for part in (self,):")),
    fault("a changed rule that leaves no mark", "tests/test_training_session.py",
          ("cast/training/session.py", 'dense=data.sampling == "dense",', "")),
    fault("lists parted at what Unicode calls a line", "tests/test_video_annotations.py -k line_feeds",
          ("cast/ground/files.py", 'text.removesuffix("\\n").split("\\n")', "text.splitlines()")),
    fault("a video listed twice", "tests/test_video_check.py -k evaluate",
          ("cast/video/datasets.py", "            check_once(self.annotations(split), samples)\n", "")),
    fault("quotes kept in names", "tests/test_video_annotations.py -k quotes_lose",
          (LISTS, "return name[1:-1].replace(mark * 2, mark)", "return name")),
    fault("blanks in quotes stripped", "tests/test_video_annotations.py -k within_quotes",
          (LISTS, "lambda found: found[1] or \"\"", "lambda found: (found[1] or \"\").replace(' \"', '\"')")),
    fault("negative labels taken for names", "tests/test_video_annotations.py -k no_table",
          ("cast/video/tables.py", "if below := [head for head in heads if", "if below := [head for head in () if")),
    fault("any dot taken for an ending", "tests/test_video_annotations.py -k gets_mp4",
          (LISTS, "path.suffix.lower() in VIDEO_ENDINGS:", "path.suffix:")),
    fault("a number of pictures taken for a part of the name", "tests/test_video_annotations.py -k how_many_pictures",
          (LISTS, "if counted and is_index(counted[2]):", "if False:")),
    fault("a gap in a folder of frames closed up", FOLDERS_TEST,
          (FOLDERS, "if missing := found.count - len(values):", "if missing := 0:")),
    fault("a folder of frames from any number on", FOLDERS_TEST, (FOLDERS, "if first > 1:", "if False:")),
    fault("pictures not turned upright", FOLDERS_TEST,
          (FOLDERS, 'ImageOps.exif_transpose(picture).convert("RGB")', 'picture.convert("RGB")')),
    fault("PNG's checksums not read", FOLDERS_TEST, (FOLDERS, "picture.verify()", "pass")),
    fault("transparent pixels shown", FOLDERS_TEST, (FOLDERS, "getextrema()[3][0] < 255", "getextrema()[3][0] < 0")),
    fault("labels of a test set in the data set's order", "tests/test_evaluation_names.py",
          ("cast/evaluation/names.py", "places[head][label] for head", "label for head")),
    fault("CLIP's position table taken by rows", "tests/test_weights_elsewhere.py -k positions",
          ("cast/model/weights/clip.py", "(0, (old, old)).movedim(-1, 0)", "(0, (old, old)).permute(2, 1, 0)")),
    fault("a learned table taken for VideoMAE's", "tests/test_weights_elsewhere.py -k mmaction",
          ("cast/model/weights/videomae.py", "_ROUNDING = 1e-3", "_ROUNDING = 1e3")),
    fault("the average preferred to the weights", "tests/test_weights_elsewhere.py -k average",
          ("cast/model/weights/source.py", "    if weights:\n        return _open_containers(weights[1])\n", "")),
    fault("a lost batch taken for the one that kills", "tests/test_video_loader.py -k lost_with_it",
          ("cast/video/loader.py", "keys[done : done + 1] if deaths else keys[done:]", "keys[done:]")),
    # --- files
    fault("frames below a folder left out", "tests/test_video_folder.py -k numbered_frames",
          (FOLDER, "            found.videos.append(place)\n", "            pass\n")),
    fault("a folder that may not be entered ends the search", "tests/test_video_folder.py -k be_entered",
          (FOLDER, "if not os.access(place, os.X_OK):", "if False:")),
    fault("a mirrored file shown by its angle alone", "tests/test_video_reader.py -k display_matrix",
          (ORIENTATION, "picture, across, down = picture.swapaxes(0, 1), c, b",
           "picture, across, down = picture.swapaxes(0, 1), -b, b")),
    fault("a file shown at any angle as it is stored", "tests/test_video_reader.py -k turned_otherwise",
          (ORIENTATION, "        raise video_error(\n            path,\n            f\"is to be shown",
           "        return picture\n        raise video_error(\n            path,\n            f\"is to be shown")),
    fault("pictures shrunk without antialiasing", "tests/test_video_shrink.py",
          ("cast/video/shrink.py", "antialias=True", "antialias=False")),
    fault("tests that look at pictures as they are stored", SIDES,
          ("cast/video/views.py", "decoder(self.decoder, self.short_side)", "decoder(self.decoder)")),
    fault("a stream that is not shrunk", SIDES,
          ("cast/predict/window.py", "shrink(np.ascontiguousarray(frame), self.protocol.short_side)",
           "np.ascontiguousarray(frame)")),
    fault("a model that forgets its short side", SIDES,
          ("cast/model/hub.py", "as_json(self.sampling, self.short_side)", "as_json(self.sampling)")),
    fault("endings in small letters only", "tests/test_video_folder.py",
          (FOLDER, "path.suffix.lower() not in", "path.suffix not in")),
    fault("linked folders searched as often as they are linked", "tests/test_video_folder.py -k links",
          (FOLDER, "            seen.add((status.st_dev, status.st_ino))\n",
           "            seen.add((status.st_dev, status.st_ino)) if not place.is_symlink() else None\n")),
    fault("names printed as Python holds them", "tests/test_video_folder.py",
          ("cast/ground/files.py", "return _SURROGATE.sub(", "return os.fspath(name) or _SURROGATE.sub(")),
    fault("a wait for a camera without an end", "tests/test_video_stream_waits.py -k in_time --timeout 20",
          ("cast/video/stream.py", "self._made.get(timeout=seconds or None)", "self._made.get()"),
          ("cast/video/stream.py", "limit + _LONGER if limit else None", "None")),
]  # fmt: skip
