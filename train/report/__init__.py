"""`moejax report`: what a run did, or several side by side, as one HTML file and its pictures as PNG files."""

from train.report.page import write_report as write_report
