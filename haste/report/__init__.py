"""From scores and logs to a report: tables, figures, one self-contained HTML file. No torch.

Start at `page.write`; `content` holds the dataclasses that describe a report, `compare` says what may be compared.
"""
