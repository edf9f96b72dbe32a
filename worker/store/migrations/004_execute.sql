-- Where default privileges withhold EXECUTE from PUBLIC, the view `status` could not be read. The function counts only
-- what its caller may read.
grant execute on function users_sync_worker.count_users(text) to public;
