"""Evaluate a checkpoint on clips whose frames are in random order: is time used?

    python -m tools.shuffled runs/NAME/last.pt --predictions shuffled.csv

The options are evaluate.py's. The T_s frames that are seen at full size change places among
themselves, and so do the others: what is blind to order then sees the same images, and keeps its
accuracy. (Of the 24 orders of four frames one is the original.)
"""

import numpy as np

import evaluate
from data import VideoViews
from support.processes import UserError, in_turn, processes, say
from support.tables import write_predictions


class ShuffledViews(VideoViews):
    """Each video has an order of its own, the same in all of its views."""

    def __init__(self, spatial_frames, *args):
        """spatial_frames: T_s of the model that they are for; then what VideoViews takes."""
        super().__init__(*args)
        self.spatial_frames = spatial_frames

    def __getitem__(self, index):
        views = super().__getitem__(index)
        if views.error is not None:
            return views
        rng, order = np.random.default_rng(index), np.arange(views.pixels.shape[1])
        at_full_size = order % (len(order) // self.spatial_frames) == 0
        for part in (at_full_size, ~at_full_size):
            order[part] = rng.permutation(order[part])
        return views._replace(pixels=views.pixels[:, order])


def main(argv=None):
    args = evaluate.parse(argv)
    with processes("shuffled.py", args.device) as (rank, _, device):
        if args.video:
            raise UserError("single videos have no accuracy: leave them out, or name a data set")
        dtype, model, settings, samples, _ = in_turn(lambda: evaluate.set_up(args, device))
        test_views = ShuffledViews(
            model.spatial_frames,
            samples,
            model.num_frames,
            model.visual.image_size[0],
            settings["sampling"],
            settings["test_stride"],
            args.views,
        )
        rows = evaluate.predict(model, test_views, device, dtype, args.batch, args.workers)
        say(f"top-1 {100 * evaluate.summarise(rows)['top1']:.2f} % with the frames shuffled")
        if args.predictions and rank == 0:
            write_predictions(args.predictions, rows, samples, settings["classes"])


if __name__ == "__main__":
    main()
