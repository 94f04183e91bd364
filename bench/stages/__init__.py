"""The stages of ``bench/campaign.py``, one file each: ``run(stage)`` measures and puts what it finds into the journal."""
