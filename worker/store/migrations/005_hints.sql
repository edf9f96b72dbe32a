create table users_sync_worker.hint (
    target text not null,
    user_id text not null,
    asked_at timestamptz not null default clock_timestamp(),
    primary key (target, user_id)
);
comment on table users_sync_worker.hint is
    'Users to look at now, left by applications and webhooks: the holder of the lease fetches each by id, and removes its row once the answer was applied.';

create function users_sync_worker.refresh(user_id text, target text default 'neon_auth')
returns void language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if user_id !~* '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' or user_id is null then
        raise exception 'not a user id: a user id is a UUID' using errcode = 'invalid_parameter_value';
    end if;
    if not exists (select from users_sync_worker.lease l where l.target = refresh.target) then
        raise exception '%.users_sync was never synced', refresh.target using errcode = 'invalid_parameter_value';
    end if;
    insert into users_sync_worker.hint (target, user_id) values (refresh.target, lower(refresh.user_id))
    on conflict on constraint hint_pkey do update set asked_at = clock_timestamp();
end
$$;
comment on function users_sync_worker.refresh(text, text) is
    'Have the worker look at a user now. A hint is followed, never believed: a wrong one costs a request and changes nothing.';

alter table users_sync_worker.lease add column polled_at timestamptz;
comment on column users_sync_worker.lease.polled_at is
    'When the newest users were last looked at, as of the last renewal or write of the holder: sign-ups until then are rows.';

-- A hint gives nothing away and changes no row by itself.
grant usage on schema users_sync_worker to public;
grant execute on function users_sync_worker.refresh(text, text) to public;
