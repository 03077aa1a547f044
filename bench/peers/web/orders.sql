-- The peer's tables, and placing an order as one function: one round trip, one transaction, plans kept by the session.
--
-- It writes what ours writes for an order. Where ours keeps a record as an index (a user's orders, orders by state),
-- PostgreSQL's way is an index, which costs it less. Stock is taken last: its row is locked until the commit is on
-- disk, and everything that is done before is not done under that lock.

CREATE TABLE product (
    sku text PRIMARY KEY, name text NOT NULL, price bigint NOT NULL, currency text NOT NULL, version bigint NOT NULL
);
-- Most of each page is left free, so that new versions of a row fit beside it and no index is touched.
CREATE TABLE stock (
    sku text PRIMARY KEY REFERENCES product, on_hand bigint NOT NULL CHECK (on_hand >= 0), reserved bigint NOT NULL
) WITH (fillfactor = 10);
CREATE TABLE orders (
    id bigint PRIMARY KEY, number text NOT NULL, user_id bigint NOT NULL, state text NOT NULL, currency text NOT NULL,
    lines json NOT NULL, total bigint NOT NULL, created_ms bigint NOT NULL
);
CREATE INDEX orders_of_user ON orders (user_id, created_ms DESC);
CREATE INDEX orders_in_state ON orders (state, created_ms DESC);
CREATE TABLE order_event (
    order_id bigint, number int, name text NOT NULL, actor bigint NOT NULL, at_ms bigint NOT NULL,
    PRIMARY KEY (order_id, number)
);
CREATE TABLE step (
    due_ms bigint, kind text, subject text, attempt int NOT NULL, created_ms bigint NOT NULL,
    PRIMARY KEY (due_ms, kind, subject)
);
CREATE TABLE idempotency (
    scope text PRIMARY KEY, fingerprint text NOT NULL, status int NOT NULL, location text NOT NULL, body text NOT NULL,
    created_ms bigint NOT NULL
);
CREATE TABLE signing_key (kid text PRIMARY KEY, secret bytea NOT NULL);
CREATE TABLE ended_session (id text PRIMARY KEY, ended_ms bigint NOT NULL);

-- `found` is NULL where the order was placed; else the answer that this scope was given before. An exception undoes
-- the whole: P0001 with the message `products_changed`, `insufficient_stock` and the sku as the detail.
CREATE FUNCTION place_order(
    of_scope text, of_fingerprint text, of_location text, of_body text,
    of_id bigint, of_number text, of_user bigint, of_currency text, of_lines json, of_total bigint,
    skus text[], quantities bigint[], versions bigint[], at_ms bigint, expires_ms bigint
) RETURNS TABLE (found_fingerprint text, found_status int, found_location text, found_body text)
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO idempotency VALUES (of_scope, of_fingerprint, 201, of_location, of_body, at_ms)
        ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN QUERY SELECT fingerprint, status, location, body FROM idempotency WHERE scope = of_scope;
        RETURN;
    END IF;
    -- Without a lock: an order that reads a price in the moment in which it changes was placed before that.
    FOR turn IN 1 .. cardinality(skus) LOOP
        PERFORM FROM product WHERE sku = skus[turn] AND version = versions[turn];
        IF NOT FOUND THEN
            RAISE EXCEPTION 'products_changed' USING DETAIL = skus[turn];
        END IF;
    END LOOP;
    INSERT INTO orders
        VALUES (of_id, of_number, of_user, 'pending_payment', of_currency, of_lines, of_total, at_ms);
    INSERT INTO order_event VALUES (of_id, 1, 'placed', of_user, at_ms);
    INSERT INTO step VALUES (expires_ms, 'expire', 'order/' || of_id, 0, at_ms);
    -- In the order of their skus, as the caller has them, so that no two orders can wait for each other.
    FOR turn IN 1 .. cardinality(skus) LOOP
        UPDATE stock SET on_hand = on_hand - quantities[turn], reserved = reserved + quantities[turn]
            WHERE sku = skus[turn] AND on_hand >= quantities[turn];
        IF NOT FOUND THEN
            RAISE EXCEPTION 'insufficient_stock' USING DETAIL = skus[turn];
        END IF;
    END LOOP;
END
$$;
