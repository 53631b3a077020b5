"""`python -m first_contact`, as `tools/first_contact.sh` calls it."""

import sys

from first_contact.run import main

sys.exit(main())
