"""A site's compute manager (CRM): its nodes and addresses, promised to coordinators."""
