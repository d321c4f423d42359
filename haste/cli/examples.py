"""An example of each command, which its --help shows."""

STATE = "results/states/TRAJECTORY/step-00000400.safetensors"
RUN = "-c config/digits.yaml"

EXAMPLES = {
    "autoencoder": RUN,
    "cancel": "HASTE -c config/imagenet256.yaml",
    "detector": f"digits-cnn {RUN}",
    "draw": f"{STATE} --class 3 --class 7 --guidance 2 --out threes-and-sevens.png",
    "evaluate": f"SAMPLES --detector digits-cnn {RUN}",
    "export": f"{STATE} out.pt --format repa",
    "features": f"SAMPLES --detector digits-cnn --shard 0 {RUN}",
    "fetch": "-c config/imagenet256.yaml",
    "floor": RUN,
    "forget": f"ATTA {RUN} --yes",
    "grid": f"SAMPLES {RUN}",
    "images": f"--check {RUN}",
    "import": "0400000.pt repa.safetensors",
    "latents": f"--shard 0 {RUN}",
    "measure": "cknna repa.safetensors -c config/study.yaml",
    "memory": "-c config/imagenet256.yaml",
    "new": "pictures/ -o config/mine.yaml",
    "plan": "-c config/imagenet256.yaml --as 8xH100",
    "prune": "-c config/digits.yaml config/study.yaml",
    "reference": f"--detector digits-cnn {RUN}",
    "replay": "HASTE -c config/study.yaml --set gradient-angle.every=50",
    "report": RUN,
    "sample": f"SAMPLES --shard 0 {RUN}",
    "score": "samples.npz --reference VIRTUAL_imagenet256_labeled.npz",
    "show": STATE,
    "status": f"--watch {RUN}",
    "suggest-stop": "HASTE -c config/study.yaml",
    "table": RUN,
    "targets": "digits-vit --shard 0 -c config/mine.yaml",
    "teacher": f"digits-vit {RUN}",
    "text": "--shard 0 -c config/digits-captions.yaml",
    "train": f"TRAJECTORY/400 {RUN}",
}
