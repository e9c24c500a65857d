"""Numbers to tables, plots and one HTML page; reads JSON, measures nothing.

from convex_caldera.report import write_report
write_report([Path("runs/a"), Path("runs/b")], Path("report"), [Path("eval.json")])
"""

from convex_caldera.report.read import read_run as read_run
from convex_caldera.report.write import write_report as write_report
