create table users_sync_worker.snapshot (
    target text primary key references users_sync_worker.lease (target),
    made_for text not null,
    identity bigint not null,
    cluster text not null,
    horizon text not null,
    own text[] not null,
    strange bigint not null,
    seal bytea not null,
    saved_at timestamptz not null
);
comment on table users_sync_worker.snapshot is
    'The worker''s picture of the live rows as of its last census of them, so that the next run starts warm. It is believed only if its seal fits, and only of rows that were not written since horizon.';

create table users_sync_worker.snapshot_chunk (
    target text not null references users_sync_worker.lease (target),
    number bigint not null check (number >= 0),
    keys bytea not null,
    fingerprints bytea not null,
    primary key (target, number)
);
-- They are hashes: to compress them takes time and saves nothing. Apart, so that a changed user moves 8 bytes and not 32.
alter table users_sync_worker.snapshot_chunk
    alter column keys set storage external,
    alter column fingerprints set storage external;
comment on table users_sync_worker.snapshot_chunk is
    'Neighbouring live rows of a snapshot: sign-ups (8 bytes each) and ids (16 bytes each) in keys, and a fingerprint (8 bytes each).';

create function users_sync_worker.cluster() returns text
language plpgsql stable set search_path = pg_catalog as $$
begin
    return (select system_identifier from pg_control_system()) || '/' || (select timeline_id from pg_control_checkpoint());
exception when insufficient_privilege then
    return '';
end
$$;
comment on function users_sync_worker.cluster() is
    'Tells servers apart: each counts transactions from its own start, and so does one restored from an archive.';
grant execute on function users_sync_worker.cluster() to public;
