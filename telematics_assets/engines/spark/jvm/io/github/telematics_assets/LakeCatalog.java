package io.github.telematics_assets;

import java.util.HashMap;
import java.util.List;
import java.util.Map;

import org.apache.hadoop.fs.Path;
import org.apache.spark.sql.SparkSession;
import org.apache.spark.sql.catalyst.analysis.NoSuchTableException;
import org.apache.spark.sql.connector.catalog.Identifier;
import org.apache.spark.sql.connector.catalog.StagedTable;
import org.apache.spark.sql.connector.catalog.Table;
import org.apache.spark.sql.connector.catalog.TableCatalog;
import org.apache.spark.sql.connector.catalog.TableChange;
import org.apache.spark.sql.connector.catalog.TableInfo;
import org.apache.spark.sql.connector.expressions.Transform;
import org.apache.spark.sql.delta.catalog.DeltaCatalog;
import org.apache.spark.sql.types.StructType;
import org.apache.spark.sql.util.CaseInsensitiveStringMap;

/**
 * A Spark catalog whose tables are the Delta tables below a folder: {@code <root>/<schema>/<table>}.
 *
 * <p>Nothing is registered anywhere. Each name is turned into Delta's own {@code delta.`<path>`} when it is asked for, so
 * that what another process wrote, dropped or made again is seen by the next query, and no metastore is there to be
 * locked. What the folder holds is {@link LakeFolder}'s business.
 *
 * <p>Options: {@code root}, a folder as Hadoop knows it; {@code schemas}, names with commas between them, which are there
 * even while they have no folder.
 */
public final class LakeCatalog extends DeltaCatalog {
  private static final String PATH_NAMESPACE = "delta";
  /** Properties of tables that belong to a stream or a replication, which keep a position for them. */
  private static final List<String> OWNED = List.of("telematics.streamId", "telematics.source");

  private String name;
  private LakeFolder folder;

  @Override
  public void initialize(String name, CaseInsensitiveStringMap options) {
    this.name = name;
    String root = options.get("root");
    if (root == null) {
      throw new IllegalArgumentException("Set spark.sql.catalog." + name + ".root to the folder of the schemas.");
    }
    folder = new LakeFolder(
        name,
        new Path(root),
        options.getOrDefault("schemas", "").split(","),
        () -> SparkSession.active().sessionState().newHadoopConf());
    setDelegateCatalog(folder);
    super.initialize(name, options);
  }

  @Override
  public String name() {
    return name;
  }

  @Override
  public Table loadTable(Identifier table) {
    if (isPathIdentifier(table)) {
      return super.loadTable(table);
    }
    Path found = folder.find(table);
    if (found == null) {
      throw LakeFolder.unchecked(new NoSuchTableException(table));
    }
    return loadPathTable(byPath(found));
  }

  @Override
  public Table createTable(Identifier table, StructType schema, Transform[] parts, Map<String, String> properties) {
    return super.createTable(target(table), schema, parts, delta(table, properties));
  }

  @Override
  public Table createTableLike(Identifier table, TableInfo info, Table source) {
    delta(table, info.properties());
    return super.createTableLike(target(table), info, source);
  }

  @Override
  public StagedTable stageCreate(Identifier table, StructType schema, Transform[] parts, Map<String, String> properties) {
    return super.stageCreate(target(table), schema, parts, delta(table, properties));
  }

  @Override
  public StagedTable stageReplace(Identifier table, StructType schema, Transform[] parts, Map<String, String> properties) {
    return super.stageReplace(target(table), schema, parts, delta(table, properties));
  }

  @Override
  public StagedTable stageCreateOrReplace(
      Identifier table, StructType schema, Transform[] parts, Map<String, String> properties) {
    return super.stageCreateOrReplace(target(table), schema, parts, delta(table, properties));
  }

  @Override
  public Table alterTable(Identifier table, TableChange[] changes) {
    for (TableChange change : changes) {
      if (change instanceof TableChange.SetProperty
          && TableCatalog.PROP_LOCATION.equals(((TableChange.SetProperty) change).property())) {
        throw LakeFolder.refused("SET LOCATION", table.toString(), "a table of " + name + " is where its name says.");
      }
    }
    return super.alterTable(table, changes);
  }

  @Override
  public boolean dropTable(Identifier table) {
    if (folder.tableExists(table) && OWNED.stream().anyMatch(loadTable(table).properties()::containsKey)) {
      throw LakeFolder.refused(
          "DROP TABLE",
          table.toString(),
          "a stream or a replication goes on with it, and its rows would be lost or come twice. "
              + "`telematics reset STREAM --drop-table` drops a stream's table together with its checkpoint.");
    }
    return super.dropTable(table);
  }

  /** Where a table is, or will be once it is made. */
  private Identifier target(Identifier table) {
    if (isPathIdentifier(table)) {
      return table;
    }
    Path found = folder.find(table);
    return byPath(found == null ? folder.place(table) : found);
  }

  private Identifier byPath(Path path) {
    return Identifier.of(new String[] {PATH_NAMESPACE}, path.toString());
  }

  /** The properties of a table that is to be made: Delta, and in its place, whatever the session's default is. */
  private Map<String, String> delta(Identifier table, Map<String, String> given) {
    if (isPathIdentifier(table)) {
      return given;
    }
    Map<String, String> properties = new HashMap<>(given);
    String provider = properties.putIfAbsent(TableCatalog.PROP_PROVIDER, "delta");
    if (provider != null && !provider.equalsIgnoreCase("delta")) {
      throw LakeFolder.refused(
          "FORMAT", table.toString(), provider + " is not Delta, and the tables of " + name + " are. Leave USING out.");
    }
    if (properties.containsKey(TableCatalog.PROP_LOCATION)) {
      throw LakeFolder.refused(
          "LOCATION", table.toString(), "a table of " + name + " is where its name says. Leave LOCATION out.");
    }
    return properties;
  }
}
