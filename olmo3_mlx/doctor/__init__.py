"""Whether this machine computes what Olmo 3 is: `for finding in examine(): print(finding)`."""

from olmo3_mlx.doctor.examination import examine
from olmo3_mlx.doctor.finding import Finding

__all__ = ["Finding", "examine"]
