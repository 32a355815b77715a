"""Tables and pictures of what was found."""

from jtl.report.audit import audit_table
from jtl.report.comparison import comparison_picture, comparison_table

__all__ = ["audit_table", "comparison_picture", "comparison_table"]
