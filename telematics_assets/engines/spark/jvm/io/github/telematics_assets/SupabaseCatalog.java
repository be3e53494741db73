package io.github.telematics_assets;

import java.util.HashMap;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.function.Supplier;

import org.apache.spark.sql.connector.catalog.Column;
import org.apache.spark.sql.connector.catalog.Identifier;
import org.apache.spark.sql.connector.catalog.NamespaceChange;
import org.apache.spark.sql.connector.catalog.SupportsRead;
import org.apache.spark.sql.connector.catalog.SupportsWrite;
import org.apache.spark.sql.connector.catalog.Table;
import org.apache.spark.sql.connector.catalog.TableCapability;
import org.apache.spark.sql.connector.catalog.TableChange;
import org.apache.spark.sql.connector.catalog.TableInfo;
import org.apache.spark.sql.connector.catalog.TableWritePrivilege;
import org.apache.spark.sql.connector.expressions.Transform;
import org.apache.spark.sql.connector.read.ScanBuilder;
import org.apache.spark.sql.connector.write.LogicalWriteInfo;
import org.apache.spark.sql.connector.write.WriteBuilder;
import org.apache.spark.sql.execution.datasources.v2.jdbc.JDBCTableCatalog;
import org.apache.spark.sql.types.StructType;
import org.apache.spark.sql.util.CaseInsensitiveStringMap;

/**
 * A database behind a transaction pooler as a Spark catalog that can only be read.
 *
 * <p>A pooler hands a server connection to whoever comes next, so that a session can't be made read only in the
 * database without doing the same to strangers: what writes is refused here, before it gets there. The role's own
 * rights hold besides.
 */
public final class SupabaseCatalog extends JDBCTableCatalog {
  private static final String PASSWORD = "password";
  /** Passwords by catalog. A setting of Spark would stand on command lines, or in each job of the event log. */
  private static final Map<String, String> PASSWORDS = new ConcurrentHashMap<>();

  /** Tells this process the password of a catalog, before the catalog is first used. */
  public static void unlock(String catalog, String password) {
    PASSWORDS.put(catalog, password);
  }

  @Override
  public void initialize(String name, CaseInsensitiveStringMap options) {
    Map<String, String> all = new HashMap<>(options.asCaseSensitiveMap());
    if (!options.containsKey(PASSWORD) && PASSWORDS.containsKey(name)) {
      all.put(PASSWORD, PASSWORDS.get(name));
    }
    super.initialize(name, new CaseInsensitiveStringMap(all));
  }

  @Override
  public Table loadTable(Identifier table) {
    return new ReadOnlyTable(super.loadTable(table), () -> refused("Writing to " + table));
  }

  @Override
  public Table loadTable(Identifier table, Set<TableWritePrivilege> writing) {
    throw refused("Writing to " + table);
  }

  @Override
  @SuppressWarnings("deprecation")
  public Table createTable(Identifier table, StructType schema, Transform[] parts, Map<String, String> properties) {
    throw refused("CREATE TABLE " + table);
  }

  @Override
  public Table createTable(Identifier table, Column[] columns, Transform[] parts, Map<String, String> properties) {
    throw refused("CREATE TABLE " + table);
  }

  @Override
  public Table createTable(Identifier table, TableInfo info) {
    throw refused("CREATE TABLE " + table);
  }

  @Override
  public Table createTableLike(Identifier table, TableInfo info, Table source) {
    throw refused("CREATE TABLE " + table);
  }

  @Override
  public Table alterTable(Identifier table, TableChange[] changes) {
    throw refused("ALTER TABLE " + table);
  }

  @Override
  public boolean dropTable(Identifier table) {
    throw refused("DROP TABLE " + table);
  }

  @Override
  public void renameTable(Identifier from, Identifier to) {
    throw refused("RENAME TABLE " + from);
  }

  @Override
  public void createNamespace(String[] namespace, Map<String, String> metadata) {
    throw refused("CREATE SCHEMA " + String.join(".", namespace));
  }

  @Override
  public void alterNamespace(String[] namespace, NamespaceChange[] changes) {
    throw refused("ALTER SCHEMA " + String.join(".", namespace));
  }

  @Override
  public boolean dropNamespace(String[] namespace, boolean cascade) {
    throw refused("DROP SCHEMA " + String.join(".", namespace));
  }

  private UnsupportedOperationException refused(String what) {
    return new UnsupportedOperationException(
        "TELEMATICS_SUPABASE_IS_READ_ONLY: " + what + " is refused: the catalog " + name()
            + " can only be read. Change the database with its own tools.");
  }

  /** A table without the ways to write that Spark's own JDBC table has; some statements ask it alone. */
  private static final class ReadOnlyTable implements Table, SupportsRead, SupportsWrite {
    private final Table table;
    private final Supplier<UnsupportedOperationException> refusal;

    private ReadOnlyTable(Table table, Supplier<UnsupportedOperationException> refusal) {
      this.table = table;
      this.refusal = refusal;
    }

    @Override
    public String name() {
      return table.name();
    }

    @Override
    public Column[] columns() {
      return table.columns();
    }

    @Override
    public Set<TableCapability> capabilities() {
      return table.capabilities();
    }

    @Override
    public ScanBuilder newScanBuilder(CaseInsensitiveStringMap options) {
      return ((SupportsRead) table).newScanBuilder(options);
    }

    @Override
    public WriteBuilder newWriteBuilder(LogicalWriteInfo info) {
      throw refusal.get();
    }
  }
}
