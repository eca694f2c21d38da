"""Evaluate a checkpoint on clips whose frames are in an order drawn by chance: is time used?

    python -m tools.shuffled runs/NAME/last.pt --predictions shuffled.csv

Takes what evaluate.py takes. What knows nothing of order keeps its accuracy.
"""

import numpy as np

import evaluate
from data import VideoViews
from support.processes import in_turn, processes, say
from support.tables import write_predictions


class ShuffledViews(VideoViews):
    """Each video has an order of its own, the same in all of its views."""

    def __getitem__(self, index):
        views = super().__getitem__(index)
        if views.error is not None:
            return views
        order = np.random.default_rng(index).permutation(views.pixels.shape[1])
        return views._replace(pixels=views.pixels[:, order])


def main(argv=None):
    args = evaluate.parse(argv)
    with processes("shuffled.py", args.device) as (rank, _, device):
        dtype, model, settings, samples, _ = in_turn(lambda: evaluate.set_up(args, device))
        size, sampling = model.visual.image_size[0], settings["sampling"]
        test_views = ShuffledViews(
            samples, model.num_frames, size, sampling, settings["test_stride"], args.views
        )
        rows = evaluate.predict(model, test_views, device, dtype, args.batch, args.workers)
        say(f"top-1 {100 * evaluate.summarise(rows)['top1']:.2f} % with the frames shuffled")
        if args.predictions and rank == 0:
            write_predictions(args.predictions, rows, samples, settings["classes"])


if __name__ == "__main__":
    main()
